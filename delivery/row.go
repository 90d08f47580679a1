package delivery

// row is a doubly linked list of things that hold their own places in it, so that
// moving one allocates nothing. The zero value is empty.
type row[T any] struct{ first, last *place[T] }

// place is where a thing stands: in one row at most.
type place[T any] struct {
	of         T
	row        *row[T]
	prev, next *place[T]
}

// push puts p at the end, and takes it out of the row that it was in.
func (r *row[T]) push(p *place[T]) {
	p.leave()
	p.row, p.prev = r, r.last
	if r.last != nil {
		r.last.next = p
	} else {
		r.first = p
	}
	r.last = p
}

// leave takes p out of its row, if it is in one.
func (p *place[T]) leave() {
	if p.row == nil {
		return
	}
	if p.prev != nil {
		p.prev.next = p.next
	} else {
		p.row.first = p.next
	}
	if p.next != nil {
		p.next.prev = p.prev
	} else {
		p.row.last = p.prev
	}
	p.row, p.prev, p.next = nil, nil, nil
}
