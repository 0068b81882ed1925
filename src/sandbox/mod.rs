//! Locking in a program that reads what an enemy may have written, so that taking it over gains
//! nothing.
//!
//! ```text
//!   Sandbox::new      in our process: opens what may be read, builds the rules and the filter
//!        │ fork
//!   Sandbox::enter    in the child, with system calls alone:
//!        │              limits ─ no new privileges ─ capabilities ─ Landlock ─ seccomp
//!        ▼ exec
//!   the program       has the descriptors that it was given, the files that were named, and no more
//! ```
//!
//! | rule | what it takes away |
//! |---|---|
//! | Landlock (`landlock.rs`) | every file but those that were named; TCP; signals and abstract sockets of others |
//! | seccomp (`seccomp.rs`, `calls.rs`) | sockets, processes, changes of owners, modes and attributes, requests to files, and what only the kernel's administrator needs |
//! | capabilities | all but reading files of other users, which root needs to open what it may open |
//! | limits | memory, time, and any byte written to a file |
//!
//! A kernel without Landlock or seccomp is refused: nothing is run there.

mod calls;
mod landlock;
mod seccomp;

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// What may be done with a file or directory, and with all that lies below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Files are read, directories listed.
    Read,
    /// The same, and programs are run.
    Run,
    /// A device: read, and asked for its size and its blocks.
    ReadDevice,
    /// Read and written; for `/dev/null`.
    ReadWrite,
}

/// The limits of a program (setrlimit(2)).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of memory that can be written to, but for stacks that grow and what is shared.
    pub(crate) data: u64,
    /// Bytes of addresses: of all memory, whatever is done with it.
    pub(crate) address_space: u64,
    /// Bytes of the stack; of each, in the C libraries that make the stacks of threads as large.
    pub(crate) stack: u64,
    /// Seconds of CPU time, after which it is killed.
    pub(crate) cpu_time: u64,
    /// Open files.
    pub(crate) open_files: u64,
}

/// The reason why nothing can be locked in here; text to follow what was to be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    #[error(
        "this kernel has no Landlock, or it is switched off (Linux 5.13, CONFIG_SECURITY_LANDLOCK, \
         landlock in lsm=)"
    )]
    NoLandlock,
    #[error("this kernel or this processor has no seccomp filters")]
    NoSeccomp,
    #[error("its rules cannot be made: {0}")]
    Rules(String),
}

/// The rules for a program, to be entered between fork and exec.
#[derive(Debug)]
pub(crate) struct Sandbox {
    ruleset: OwnedFd,
    filter: Vec<libc::sock_filter>,
    limits: Limits,
}

impl Sandbox {
    /// Makes the rules of a program that has the descriptors that it inherits, may open `files` and
    /// what lies below them, and nothing else.
    ///
    /// # Errors
    /// [`SandboxError`].
    pub(crate) fn new(
        files: &[(BorrowedFd<'_>, Access)],
        limits: Limits,
    ) -> Result<Self, SandboxError> {
        let filter = seccomp::filter().ok_or(SandboxError::NoSeccomp)?;
        Ok(Self { ruleset: landlock::ruleset(files)?, filter, limits })
    }

    /// Locks in the calling thread, for ever, and all that it starts. Makes only system calls, so
    /// that it may be called between fork and exec.
    ///
    /// # Errors
    /// The errno of the call that failed; the thread is half locked in then, and must run nothing.
    pub(crate) fn enter(&self) -> io::Result<()> {
        self.limits.apply()?;
        rustix::thread::set_no_new_privs(true)?;
        drop_capabilities()?;
        landlock::restrict_self(&self.ruleset)?;
        seccomp::apply(&self.filter)
    }
}

impl Limits {
    fn apply(&self) -> io::Result<()> {
        let limits = [
            (Resource::Data, self.data),
            (Resource::As, self.address_space),
            (Resource::Stack, self.stack),
            (Resource::Cpu, self.cpu_time),
            (Resource::Nofile, self.open_files),
            // Pipes and sockets are no files.
            (Resource::Fsize, 0),
            (Resource::Core, 0),
        ];
        for (resource, most) in limits {
            let now = rustix::process::getrlimit(resource);
            let most = now.maximum.map_or(most, |maximum| maximum.min(most));
            setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
        }
        Ok(())
    }
}

/// Gives up all capabilities but the one by which root reads the files of others. Without new
/// privileges, none of them comes back by exec (capabilities(7)).
fn drop_capabilities() -> io::Result<()> {
    let now = rustix::thread::capabilities(None)?;
    let kept = now.effective & CapabilitySet::DAC_READ_SEARCH;
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Opens the file or directory at `path` for a rule; links are followed. `None` where there is none.
pub(crate) fn open_for_rule(path: &str) -> Option<File> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).ok().map(File::from)
}

#[cfg(test)]
mod tests;
