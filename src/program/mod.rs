//! Programs that the daemon starts, for streams and as servers: what they say, how they are told to
//! stop, and what happens to them when the daemon is killed.

pub mod guard;
pub(crate) mod stderr;
pub mod stop;
