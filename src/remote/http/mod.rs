//! Images on HTTP(S) servers, read by ranges (RFC 9110, 14).
//!
//! ```text
//!   client      HttpClient, a Transport: opens an image
//!     ├── file        a short file beside an image
//!     └── requests    retries, outages, the latch of a changed image
//!           │     └── retry, late    pure: pauses, and when an answer is late
//!           └── exchange    one answer to one range: redirects, credentials, what must hold of the answer
//!                 ├── origin         connections: one `reqwest` client for the image's host, one for others
//!                 ├── auth           header lines from a file or a command
//!                 ├── url, answer    pure: addresses and redirects, heads of answers
//!                 └── error
//!   runtime     the threads of it all, started with the first image
//! ```
//!
//! Only an answer 206 with exactly the range that was asked for gives bytes. A version of the image is
//! told by its strong ETag, which every request names (`If-Range`) and every answer is compared with.

mod answer;
mod auth;
mod client;
mod error;
mod exchange;
mod file;
mod late;
mod origin;
mod requests;
mod retry;
mod runtime;
#[cfg(test)]
mod tests;
mod url;

pub(crate) use client::{HttpClient, HttpOptions};
pub(crate) use file::{is_same_origin, read_file};

/// The most redirects that are followed (RFC 9110, 15.4 leaves it to the client).
const MAX_REDIRECTS: usize = 10;
