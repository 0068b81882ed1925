//! Images on NBD servers.
mod codec;
