//! The bmap of a raw image whose server tells no holes (`bmap=`): where the image has data is known from
//! the start (`known_extents.rs`), and what is fetched is compared with the SHA-256 of its ranges.
//!
//! ```text
//!   a range of at most 256 KiB    is fetched as a whole, and compared before it is kept
//!   a longer one                  is compared in the background, as soon as all of it is kept
//!   one that does not match       is not kept, and every read of the image is EIO from then on
//! ```
//!
//! What is kept with a bmap is kept apart from what is kept without it, so that the former holds no bytes
//! of a short range that were not compared.

mod complete;
#[cfg(feature = "network")]
mod load;
mod open;
mod sums;

pub use self::complete::CompareError;
#[cfg(feature = "network")]
pub(super) use self::load::load;
pub(super) use self::open::OpenSums;
pub(super) use self::sums::RangeSums;
pub use self::sums::SumStatus;

#[cfg(test)]
mod tests;
