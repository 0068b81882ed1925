//! Detection of zeros in data. Pure: no I/O.

use std::ops::Range;

use crate::formats::RunContent;
use crate::zeros::is_zero;

/// Bytes in a block: the unit in which file systems allocate space.
pub(super) const BLOCK_SIZE: u64 = 4096;

/// Splits `bytes`, which are at `offset` of their file, into runs. Runs of zeros begin and end at
/// block boundaries of the file, or at an end of `bytes`; neighbouring runs differ in kind.
pub(super) fn split_zeros(bytes: &[u8], offset: u64) -> Vec<(Range<usize>, RunContent)> {
    let mut runs: Vec<(Range<usize>, RunContent)> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = BLOCK_SIZE - (offset + at as u64) % BLOCK_SIZE;
        let end = usize::try_from(rest).map_or(bytes.len(), |rest| bytes.len().min(at + rest));
        let content = if is_zero(&bytes[at..end]) { RunContent::Zeros } else { RunContent::Data };
        match runs.last_mut() {
            Some((range, last)) if *last == content => range.end = end,
            _ => runs.push((at..end, content)),
        }
        at = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zeros_are_found_in_whole_blocks_of_the_file() {
        let mut bytes = vec![0; 3 * 4096];
        bytes[5000] = 1;
        let all = [
            (0..4096, RunContent::Zeros),
            (4096..8192, RunContent::Data),
            (8192..3 * 4096, RunContent::Zeros),
        ];
        assert_eq!(split_zeros(&bytes, 8192), all);
        // 96 bytes remain of the block in which the bytes begin.
        let shifted = [
            (0..4192, RunContent::Zeros),
            (4192..8288, RunContent::Data),
            (8288..3 * 4096, RunContent::Zeros),
        ];
        assert_eq!(split_zeros(&bytes, 4000), shifted);
        assert_eq!(split_zeros(&[], 7), []);
    }

    proptest! {
        #[test]
        fn runs_cover_all_bytes_alternate_and_have_the_right_kind(
            pieces in prop::collection::vec((any::<bool>(), 1usize..6000), 0..8),
            offset in 0u64..10_000,
        ) {
            let bytes: Vec<u8> = pieces
                .iter()
                .flat_map(|(zero, len)| vec![u8::from(!*zero); *len])
                .collect();
            let found = split_zeros(&bytes, offset);
            let mut at = 0;
            for (index, (range, content)) in found.iter().enumerate() {
                prop_assert_eq!(range.start, at);
                prop_assert!(range.end > at);
                at = range.end;
                prop_assert!(index == 0 || found[index - 1].1 != *content);
                let zero = bytes[range.clone()].iter().all(|byte| *byte == 0);
                prop_assert!(zero == (*content == RunContent::Zeros));
                for edge in [range.start, range.end] {
                    let inner = edge > 0 && edge < bytes.len();
                    prop_assert!(!inner || (offset + edge as u64).is_multiple_of(BLOCK_SIZE));
                }
            }
            prop_assert_eq!(at, bytes.len());
        }
    }
}
