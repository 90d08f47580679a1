// Package store keeps a hub's queues, forwarders and the ownership of aliases on
// disk: a bridge.OutboxFactory and a bridge.Journal over one segment log.
//
// Every frame of stored class is appended to the log before its sender is
// acknowledged, and served from memory; a restart reads the log and goes on where
// the process ended, in order, from the first frame that its target had not
// acknowledged. Frames of transient class, and everything of one-shot names and
// streams, stay in memory alone.
//
// Which failures are survived is the mode's choice: with SyncAlways nothing that
// was acknowledged is lost, by a power cut neither; with SyncInterval a killed
// process loses nothing, a power cut at most the last interval. What a target
// acknowledged in the last moments before a crash may be delivered again, which
// is what "at least once" means; channels drop repeats.
//
// # Records
//
// Integers are big endian; lengths before bytes are unsigned LEB128.
//
//	1 name       id u32, name
//	2 frames     id u32, seq u64, arrival i64, flags u8, hop len and bytes,
//	             count, then for each frame its length and bytes
//	3 done       id u32, seq u64: everything up to seq is delivered
//	4 drop       id u32, seq u64: this one frame is dropped
//	5 discard    id u32: the name and all of its frames are gone
//	6 table      key len and bytes, value: an entry of a table; no value: gone
//
// The entries of tables are what bridge.NoticeJournal has, and whose the store is (Claim).
//
// A record seen twice changes nothing the second time.
//
// # Locks
//
// Outbox.mu, then Store.mu, then the log's own; a bridge calls an outbox under
// the lock of its target, which comes before them all. The log's goroutine takes
// Outbox.mu and holds nothing when it acknowledges.
package store
