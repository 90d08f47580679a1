// Package hostile plays a hub that is the attacker. A switchboard stands between
// endpoints and their hub, reads what passes frame by frame, and drops, delays,
// repeats, changes, makes up and diverts frames as an attack says. Each attack is a
// test of its own. What is held:
//
//   - what an endpoint accepts is part of what its peer sent, in order and without
//     repeats (a stock Rust endpoint: without repeats);
//   - nobody crashes or grows without bound;
//   - once the attack is over everything works again, and what was given to Deliver
//     has arrived exactly once;
//   - where the user has to know, there is an error that says so.
//
// README.md says how to run the attacks against endpoints at another hub.
package hostile
