//! The files of a program that is locked in (landlock(7)).
//!
//! A rule belongs to the file that a descriptor leads to, whatever name it has later. What a kernel
//! does not know yet is left out: sockets, signals, requests to devices and what empties a file are
//! forbidden by the filter as well.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};

use super::{Access, SandboxError};

/// The newest rules that are asked for: those of Linux 6.15.
const NEWEST: ABI = ABI::V7;

/// Makes the rules by which `files` are used, and nothing else.
pub(super) fn ruleset(files: &[(BorrowedFd<'_>, Access)]) -> Result<OwnedFd, SandboxError> {
    let failed = |error: RulesetError| SandboxError::Rules(error.to_string());
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|rules| rules.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (file, access) in files {
        let rule = PathBeneath::new(file, rights(*access));
        ruleset = ruleset.add_rule(rule).map_err(failed)?;
    }
    // There is none where the kernel has no Landlock.
    Option::<OwnedFd>::from(ruleset).ok_or(SandboxError::NoLandlock)
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    match access {
        Access::Read => read,
        Access::Run => read | AccessFs::Execute,
        Access::ReadDevice => AccessFs::ReadFile | AccessFs::IoctlDev,
        Access::ReadWrite => AccessFs::ReadFile | AccessFs::WriteFile,
    }
}

/// Applies `ruleset` to the calling thread, which has no way to new privileges any more.
pub(super) fn restrict_self(ruleset: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes two numbers, and the descriptor is open.
    let done =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
