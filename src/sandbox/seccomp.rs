//! The system calls of a program that is locked in (seccomp(2)).
//!
//! Landlock says nothing of sockets other than TCP, of modes, owners, times and attributes of files,
//! of other processes, and of what the kernel does for its administrator. The filter refuses these
//! with `EPERM`; a program finds that as it finds any other refusal.

use std::io;

use libc::{BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};

/// The architecture by which the kernel numbers the calls of this process (`linux/audit.h`); `None`
/// for one whose numbers nobody has looked at.
const ARCH: Option<u32> = if cfg!(all(target_arch = "x86_64", target_pointer_width = "64")) {
    Some(0xc000_003e)
} else if cfg!(all(target_arch = "aarch64", target_endian = "little")) {
    Some(0xc000_00b7)
} else if cfg!(target_arch = "riscv64") {
    Some(0xc000_00f3)
} else {
    None
};

/// Numbers from here on are those of x32 on x86_64, and of no call elsewhere.
const FIRST_X32: u32 = 0x4000_0000;

/// Places in `struct seccomp_data` (`linux/seccomp.h`).
const NUMBER_AT: u32 = 0;
const ARCH_AT: u32 = 4;
/// The lower half of the first argument: all of these architectures are little-endian.
const FIRST_ARGUMENT_AT: u32 = 16;

/// Calls that are refused. Those that one architecture lacks are in [`REFUSED_OLD`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
const REFUSED: &[libc::c_long] = &[
    // Sockets: the program has those that it inherits. io_uring makes them past the filter.
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_setpgid,
    libc::SYS_setsid,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_semget,
    libc::SYS_semctl,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_msgget,
    libc::SYS_msgctl,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    // Files: what Landlock does not cover, or covers only on later kernels.
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    SYS_FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    SYS_SETXATTRAT,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    SYS_REMOVEXATTRAT,
    SYS_FILE_SETATTR,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    // The kernel, its keys and its clocks.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    libc::SYS_personality,
];

/// Without a number of the architecture there is no filter.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
const REFUSED: &[libc::c_long] =
    &[SYS_FCHMODAT2, SYS_SETXATTRAT, SYS_REMOVEXATTRAT, SYS_FILE_SETATTR];

/// The same number on every architecture (`asm-generic/unistd.h`).
const SYS_FCHMODAT2: libc::c_long = 452;
const SYS_SETXATTRAT: libc::c_long = 463;
const SYS_REMOVEXATTRAT: libc::c_long = 466;
const SYS_FILE_SETATTR: libc::c_long = 469;

/// Calls of x86_64 that others have not.
#[cfg(target_arch = "x86_64")]
const REFUSED_OLD: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_kexec_file_load,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_OLD: &[libc::c_long] = &[];

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const REFUSE: u32 = errno(libc::EPERM);
/// The C library takes clone(2) then, whose flags can be seen.
const MISSING: u32 = errno(libc::ENOSYS);

#[allow(clippy::cast_sign_loss, reason = "errnos are positive")]
const fn errno(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// Builds the filter; `None` where the kernel has none, or numbers its calls in a way unknown here.
pub(super) fn filter() -> Option<Vec<libc::sock_filter>> {
    let arch = ARCH.filter(|_| is_supported())?;
    let mut program = vec![load(ARCH_AT)];
    // A program of another architecture, such as a 32-bit one, has other numbers.
    program.extend([jump(BPF_JEQ, arch, 1, 0), answer(libc::SECCOMP_RET_KILL_PROCESS)]);
    program.push(load(NUMBER_AT));
    program.extend([jump(BPF_JGE, FIRST_X32, 0, 1), answer(MISSING)]);
    program.extend([jump(BPF_JEQ, number(libc::SYS_clone3)?, 0, 1), answer(MISSING)]);
    for call in REFUSED.iter().chain(REFUSED_OLD) {
        program.extend([jump(BPF_JEQ, number(*call)?, 0, 1), answer(REFUSE)]);
    }
    // Threads, and no processes.
    program.extend([jump(BPF_JEQ, number(libc::SYS_clone)?, 0, 4), load(FIRST_ARGUMENT_AT)]);
    program.push(operation(BPF_ALU | BPF_AND | BPF_K, libc::CLONE_THREAD.cast_unsigned()));
    program.extend([jump(BPF_JEQ, 0, 0, 1), answer(REFUSE), load(NUMBER_AT)]);
    // The limits of the process itself, and not those of others.
    program.extend([jump(BPF_JEQ, number(libc::SYS_prlimit64)?, 0, 3), load(FIRST_ARGUMENT_AT)]);
    program.extend([jump(BPF_JEQ, 0, 1, 0), answer(REFUSE), answer(ALLOW)]);
    Some(program)
}

/// Applies `filter` to the calling thread, which has no way to new privileges any more.
pub(super) fn apply(filter: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the kernel reads `len` instructions of the filter, and changes none of them.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel has filters that refuse with an errno.
fn is_supported() -> bool {
    let action = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the kernel reads the action, and nothing else.
    let found = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0u32, &raw const action)
    };
    found == 0
}

fn number(call: libc::c_long) -> Option<u32> {
    u32::try_from(call).ok()
}

fn load(at: u32) -> libc::sock_filter {
    operation(BPF_LD | BPF_W | BPF_ABS, at)
}

/// Goes on `then` instructions further where the comparison holds, `otherwise` where not.
fn jump(comparison: u32, with: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    let jump = operation(BPF_JMP | comparison | BPF_K, with);
    libc::sock_filter { jt: then, jf: otherwise, ..jump }
}

fn answer(action: u32) -> libc::sock_filter {
    operation(BPF_RET | BPF_K, action)
}

#[allow(clippy::cast_possible_truncation, reason = "the codes of BPF have 16 bits")]
fn operation(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}
