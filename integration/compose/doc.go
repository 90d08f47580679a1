// Package compose holds the tests of docker-compose.yml. They load the file
// with the compose project's own loader, which checks it against the compose
// schema, and then run the very commands it names, in the order it asks for,
// as ordinary processes: no container engine is needed.
//
// It is a module of its own, so that the loader is no dependency of sealmq.
package compose
