//! States and kinds, which are words in JSON.

use serde::{Deserialize, Serialize};

use crate::stream::input::InputState;
use crate::stream::output::OutputState;

/// Defines an enum of words. A word of another version is kept as `Other`, and a missing one is
/// empty.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(from = "String", into = "String")]
        pub(crate) enum $name {
            $($(#[$variant_doc])* $variant,)+
            /// A word of another version.
            Other(String),
        }

        impl $name {
            /// Returns the word.
            pub(crate) fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $word,)+
                    Self::Other(word) => word,
                }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::Other(String::new())
            }
        }

        impl From<String> for $name {
            fn from(word: String) -> Self {
                match word.as_str() {
                    $($word => Self::$variant,)+
                    _ => Self::Other(word),
                }
            }
        }

        impl From<$name> for String {
            fn from(state: $name) -> Self {
                match state {
                    $name::Other(word) => word,
                    state => state.as_str().to_owned(),
                }
            }
        }
    };
}

words! {
    /// The state of a mount.
    MountState {
        Ready = "ready",
        /// Being unmounted: it takes no new disks.
        Draining = "draining",
        /// The daemon has ended. No daemon reports this state, nor the two below: `cowslip status`
        /// concludes them.
        Dead = "dead",
        /// Refused to the user who asks, or shown only in part.
        Private = "private",
        /// No answer, or none that is understood.
        Silent = "silent",
    }
}

words! {
    /// The state of a disk.
    DiskState {
        Ok = "ok",
        /// A sync failed: nothing more can be written.
        ReadOnly = "read-only",
        /// The overlay was removed while it was in use.
        Lost = "lost",
        /// A stream failed, or the base does not match its bmap.
        Failed = "failed",
    }
}

words! {
    /// The state of a stream.
    StreamState {
        Open = "open",
        Finishing = "finishing",
        Finished = "finished",
        Failed = "failed",
        Aborted = "aborted",
    }
}

words! {
    /// The direction of a stream.
    StreamDirection {
        /// From a source into the disk, which is read.
        In = "in",
        /// From the disk, which is written, to a sink.
        Out = "out",
    }
}

words! {
    /// The state of a hydration that is in progress.
    HydrationState {
        Running = "running",
        Paused = "paused",
    }
}

words! {
    /// The recovery of an overlay that was not closed.
    Recovery {
        /// All of it was read.
        All = "all",
        /// All that had been synced was right.
        Vouched = "vouched",
        /// All but the last record of a log, which was damaged.
        Damaged = "damaged",
    }
}

words! {
    /// The kind of an overlay.
    OverlayKindWord {
        /// Changed blocks beside the base, and a map of them.
        Blocks = "blocks",
        /// A copy of the base that shares its blocks on the host.
        Reflink = "reflink",
    }
}

impl From<OutputState> for StreamState {
    fn from(state: OutputState) -> Self {
        match state {
            OutputState::Open => Self::Open,
            OutputState::Finishing => Self::Finishing,
            OutputState::Finished => Self::Finished,
            OutputState::Failed => Self::Failed,
            OutputState::Aborted => Self::Aborted,
        }
    }
}

impl From<InputState> for StreamState {
    fn from(state: InputState) -> Self {
        match state {
            InputState::Open => Self::Open,
            InputState::Finished => Self::Finished,
            InputState::Failed => Self::Failed,
        }
    }
}
