//! The system calls, requests and commands that the filter knows ([`seccomp`](super::seccomp)).
//!
//! What is refused here does something that Landlock does not forbid, or not on every kernel that has it;
//! where a call does many things by a number, those are listed that a program needs.

/// Calls that are refused. Those that one architecture lacks are in [`REFUSED_OLD`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"))]
pub(super) const REFUSED: &[libc::c_long] = &[
    // Sockets: the program has those that it inherits. io_uring makes them past the filter. What lies
    // unread in pairs of sockets and in pipes is memory of the kernel, which no limit of a process counts.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_pipe2,
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
    // Memory that is nowhere in the address space.
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    // Files: what Landlock does not cover, or covers only on later kernels.
    libc::SYS_flock,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    SYS_GETXATTRAT,
    SYS_LISTXATTRAT,
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
    SYS_QUOTACTL_FD,
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
    SYS_OPEN_TREE_ATTR,
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
pub(super) const REFUSED: &[libc::c_long] = &[
    SYS_QUOTACTL_FD,
    SYS_FCHMODAT2,
    SYS_SETXATTRAT,
    SYS_GETXATTRAT,
    SYS_LISTXATTRAT,
    SYS_REMOVEXATTRAT,
    SYS_OPEN_TREE_ATTR,
    SYS_FILE_SETATTR,
];

// The same numbers on every architecture (`asm-generic/unistd.h`).
const SYS_QUOTACTL_FD: libc::c_long = 443;
const SYS_FCHMODAT2: libc::c_long = 452;
const SYS_SETXATTRAT: libc::c_long = 463;
const SYS_GETXATTRAT: libc::c_long = 464;
const SYS_LISTXATTRAT: libc::c_long = 465;
const SYS_REMOVEXATTRAT: libc::c_long = 466;
const SYS_OPEN_TREE_ATTR: libc::c_long = 467;
const SYS_FILE_SETATTR: libc::c_long = 469;

/// Calls of x86_64 that others have not.
#[cfg(target_arch = "x86_64")]
pub(super) const REFUSED_OLD: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_pipe,
    libc::SYS_creat,
    libc::SYS_inotify_init,
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
pub(super) const REFUSED_OLD: &[libc::c_long] = &[];

/// Requests of ioctl(2) that are answered: what the C library and QEMU ask of a descriptor or a block
/// device. All others are refused, since a request may do anything: `FS_IOC_SETFLAGS` needs no more than
/// a file that was opened to read.
pub(super) const REQUESTS: &[u32] = &[
    // FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS and TCGETS2 (`asm-generic/ioctls.h`,
    // `asm-generic/termbits.h`): isatty(3) asks the last two.
    0x541b,
    0x5421,
    0x5450,
    0x5451,
    0x5401,
    0x802c_542a,
    // BLKROGET, BLKGETSIZE, BLKSECTGET, BLKSSZGET, BLKIOMIN, BLKIOOPT, BLKALIGNOFF, BLKPBSZGET,
    // BLKDISCARDZEROES and BLKROTATIONAL; BLKBSZGET and BLKGETSIZE64 (`linux/fs.h`).
    0x125e,
    0x1260,
    0x1267,
    0x1268,
    0x1278,
    0x1279,
    0x127a,
    0x127b,
    0x127c,
    0x127e,
    0x8008_1270,
    0x8008_1272,
    // BLKGETZONESZ and BLKGETNRZONES (`linux/blkzoned.h`); HDIO_GETGEO (`linux/hdreg.h`).
    0x8004_1284,
    0x8004_1285,
    0x0301,
    // XFS_IOC_DIOINFO: how direct reads must be aligned (xfsprogs, `xfs_fs.h`).
    0x800c_581e,
];

/// Commands of fcntl(2) that are obeyed: numbers and flags of descriptors, and locks of ranges, by
/// which QEMU keeps others from writing to the image.
pub(super) const DESCRIPTOR_COMMANDS: &[libc::c_int] = &[
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETLK,
    libc::F_SETLK,
    libc::F_SETLKW,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
];
