//! The system calls of a program that is locked in (seccomp(2)).
//!
//! Landlock says nothing of sockets other than TCP, of modes, owners, times and attributes of files,
//! of other processes, and of what the kernel does for its administrator. The filter refuses these
//! with `EPERM`; a program finds that as it finds any other refusal. Which calls these are is said in
//! [`calls`](super::calls).
//!
//! The kernel gives the filter arguments of 64 bits, and the calls whose arguments are looked at take
//! 32 of them: numbers of requests and commands, and flags that lie in the lower half. So the lower half
//! is compared alone, and bits above it make no other call of one that is refused.

use std::io;

use libc::{BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W};

use super::calls::{DESCRIPTOR_COMMANDS, REFUSED, REFUSED_OLD, REQUESTS};

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
/// The lower halves of the first arguments: all of these architectures are little-endian.
const ARGUMENT_AT: [u32; 4] = [16, 24, 32, 40];

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
    for (call, checks) in argument_rules() {
        let skipped = u8::try_from(checks.len()).ok()?;
        program.push(jump(BPF_JEQ, number(call)?, 0, skipped));
        program.extend(checks);
    }
    program.push(answer(ALLOW));
    Some(program)
}

/// The calls of which it depends on an argument what they do, and the instructions that answer them.
fn argument_rules() -> Vec<(libc::c_long, Vec<libc::sock_filter>)> {
    let [first, second, third, fourth] = ARGUMENT_AT;
    let commands: Vec<u32> = DESCRIPTOR_COMMANDS.iter().map(|it| it.cast_unsigned()).collect();
    let truncate = libc::O_TRUNC.cast_unsigned();
    let mut rules = vec![
        // Threads, and no processes.
        (libc::SYS_clone, if_any_bit(first, libc::CLONE_THREAD.cast_unsigned(), ALLOW, REFUSE)),
        // The limits of the process itself, and not those of others.
        (libc::SYS_prlimit64, if_one_of(first, &[0])),
        (libc::SYS_ioctl, if_one_of(second, REQUESTS)),
        (libc::SYS_fcntl, if_one_of(second, &commands)),
        // Up to version 2 (Linux 6.1) Landlock takes a file that is emptied for one that is read.
        (libc::SYS_openat, if_any_bit(third, truncate, REFUSE, ALLOW)),
        // Its flags lie in memory, where a filter sees nothing.
        (libc::SYS_openat2, vec![answer(MISSING)]),
        (libc::SYS_mmap, if_counted_memory(fourth)),
    ];
    #[cfg(target_arch = "x86_64")]
    rules.push((libc::SYS_open, if_any_bit(second, truncate, REFUSE, ALLOW)));
    rules
}

/// Refuses memory that `RLIMIT_DATA` does not count: what grows downwards, and what is shared without a
/// file.
fn if_counted_memory(flags_at: u32) -> Vec<libc::sock_filter> {
    // A bit of both MAP_SHARED and MAP_SHARED_VALIDATE.
    let [shared, anonymous, grows_down] =
        [libc::MAP_SHARED, libc::MAP_ANONYMOUS, libc::MAP_GROWSDOWN].map(i32::cast_unsigned);
    vec![
        load(flags_at),
        jump(BPF_JSET, grows_down, 0, 1),
        answer(REFUSE),
        jump(BPF_JSET, anonymous, 0, 2),
        jump(BPF_JSET, shared, 0, 1),
        answer(REFUSE),
        answer(ALLOW),
    ]
}

/// Allows a call whose argument `at` is one of `values`, and refuses it with others.
fn if_one_of(at: u32, values: &[u32]) -> Vec<libc::sock_filter> {
    let mut checks = vec![load(at)];
    for value in values {
        checks.extend([jump(BPF_JEQ, *value, 0, 1), answer(ALLOW)]);
    }
    checks.push(answer(REFUSE));
    checks
}

/// Answers `then` where the argument `at` has any of `bits`, and `otherwise` where not.
fn if_any_bit(at: u32, bits: u32, then: u32, otherwise: u32) -> Vec<libc::sock_filter> {
    vec![load(at), jump(BPF_JSET, bits, 0, 1), answer(then), answer(otherwise)]
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
