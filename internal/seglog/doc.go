// Package seglog is an append-only log of checksummed records in segment files,
// with group commit, for the hub's queues and tables.
//
// A log is one folder. Appends of many callers are gathered and written with
// one write; each caller is told when its record is as durable as the mode says:
//
//   - SyncAlways: the record is on stable storage (fsync) before its
//     appender is told.
//   - SyncInterval: the record has been handed to the operating system, so a
//     killed process loses nothing; a power cut loses at most the last interval.
//
// The caller rebuilds its state from Open's replay, counts the records that it
// still needs in each segment (Hold, Release), and moves the few live records of
// an old segment to the head of the log when Open's Options.Relocate asks for
// it, so that a queue nobody empties does not pin the disk.
//
// # Format
//
//	segment  16-byte header, then records
//	header   "SEALMQ" | version u16 | first 8 bytes of the folder's random id
//	record   length u32 | crc u32 | kind u8 | body
//
// Integers are big endian. length counts kind and body; crc is CRC-32C over the
// length field, the kind and the body, xor the segment's salt: the lower 32 bits of
// its number times 0x9e3779b1. (In version 1 there was no salt.) Eight zeros in place of
// a record's header end the segment. Kind 255 is the log's own. A segment's file name
// is its number in 16 hexadecimal digits and ".seg"; numbers rise by one. The files
// ".newest" and "oldest" have the numbers of the newest and of the oldest that is needed,
// in the same digits and a line feed. A segment is noted as the newest once its header is
// on stable storage, and older ones than the oldest are removed once that is noted there.
//
// # Recovery
//
// A bad record in the newest segment is the torn end of a crash, and everything
// from there on is cut off and reported, unless a mark behind it tells that it had
// been synced: kind 255, the folder's id and an offset, in front of everything that
// is written at once, and at the end of a log that was closed. Then, and in any other
// segment, it is damage, as is a header that does not fit the records behind it, and
// Open refuses the log, changes nothing, and names file and offset; so it does when
// a segment is missing, or one that is noted has no header. Behind eight zeros there is the rest of a segment that was made
// ahead, which is cut off without a report. Replay can show a
// record twice (a failed sync makes the log write it again), so what a caller
// does with a record must be idempotent.
//
// # Concurrency
//
// All methods are safe for concurrent use. One goroutine writes; it alone calls
// Options.Committed and Options.Relocate, never holding a lock.
package seglog
