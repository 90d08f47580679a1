// Package compose holds the tests of docker-compose.yml and the Dockerfile.
// They load the first with the compose project's own loader, which checks it
// against the compose schema, and the second with BuildKit's parser, and then
// run the very commands that the files name, in the order they ask for, as
// ordinary processes: no container engine is needed.
//
// It is a module of its own, so that the loaders are no dependency of sealmq.
package compose
