//! The unit of an overlay's state: a block, its number, its state, and runs of blocks.
//!
//! Everything about an overlay is said in these words: the map (`blocks`), the log (`record`), and
//! the changes in between.

use std::ops::Range;

/// The number of a block: its byte offset on the disk divided by the overlay's block size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// The state of a block in this overlay. The discriminants are the numbers used in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockState {
    /// Not in this overlay: read from the layer below.
    #[default]
    Lower = 0,
    /// Stored in the overlay's data file.
    Data = 1,
    /// Reads as zeros and hides the layers below.
    Zero = 2,
}

impl From<BlockState> for u8 {
    fn from(state: BlockState) -> Self {
        state as Self
    }
}

/// A number that is not a [`BlockState`]: the source is damaged or was written by a newer version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no block state")]
pub struct UnknownBlockState(pub u8);

impl TryFrom<u8> for BlockState {
    type Error = UnknownBlockState;

    fn try_from(number: u8) -> Result<Self, UnknownBlockState> {
        match number {
            0 => Ok(Self::Lower),
            1 => Ok(Self::Data),
            2 => Ok(Self::Zero),
            _ => Err(UnknownBlockState(number)),
        }
    }
}

/// Consecutive blocks of one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRun {
    /// The blocks covered, half-open.
    pub range: Range<BlockIndex>,
    /// The state of all these blocks.
    pub state: BlockState,
}

impl BlockRun {
    /// Returns the number of blocks covered.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.range.end.0.saturating_sub(self.range.start.0)
    }

    /// Returns whether the run covers no block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_states_have_the_numbers_used_in_the_log() {
        for (number, state) in
            [(0, BlockState::Lower), (1, BlockState::Data), (2, BlockState::Zero)]
        {
            assert_eq!(BlockState::try_from(number), Ok(state));
            assert_eq!(u8::from(state), number);
        }
        assert_eq!(BlockState::try_from(3), Err(UnknownBlockState(3)));
    }
}
