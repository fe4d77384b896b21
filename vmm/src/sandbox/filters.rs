//! The system calls of each kind of thread. A row that is not plain reading, writing and waiting has its reason.

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// It is this value.
    Equal,
    /// It has none of these bits.
    Without,
}

/// One allowed call, when all conditions on its arguments (number, value, comparison) hold.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Number of the call.
    pub call: i64,
    /// Conditions.
    pub only: &'static [(u8, u64, Only)],
    /// Why the suite of small guests never makes the call; `None` when it does. `tests/syscalls.sh` compares.
    pub unseen: Option<&'static str>,
    /// It depends on how threads meet whether the suite makes it.
    pub by_chance: bool,
}

const fn any(call: i64) -> Row {
    Row { call, only: &[], unseen: None, by_chance: false }
}

const fn only(call: i64, only: &'static [(u8, u64, Only)]) -> Row {
    Row { call, only, unseen: None, by_chance: false }
}

/// A row that the suite of small guests does not reach, and why.
const fn unseen(row: Row, why: &'static str) -> Row {
    Row { unseen: Some(why), ..row }
}

/// A row that the suite reaches when threads happen to meet, and how.
const fn by_chance(row: Row, how: &'static str) -> Row {
    Row { unseen: Some(how), by_chance: true, ..row }
}

macro_rules! ioctl {
    ($number:expr) => {
        only(libc::SYS_ioctl, &[(1, $number, Only::Equal)])
    };
}

const KVM_RUN: u64 = 0xAE80;
const KVM_GET_REGS: u64 = 0x8090_AE81;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_AE6A;
const KVM_IRQFD: u64 = 0x4020_AE76;
const KVM_IOEVENTFD: u64 = 0x4040_AE79;
const KVM_SIGNAL_MSI: u64 = 0x4020_AEA5;
const KVM_CHECK_EXTENSION: u64 = 0xAE03;
const KVM_GET_MSR_INDEX_LIST: u64 = 0xC004_AE02;
const KVM_GET_CLOCK: u64 = 0x8030_AE7C;
const KVM_GET_DIRTY_LOG: u64 = 0x4010_AE42;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
const KVM_GET_SREGS: u64 = 0x8138_AE83;
const KVM_GET_XSAVE: u64 = 0x9000_AEA4;
const KVM_GET_XSAVE2: u64 = 0x9000_AECF;
const KVM_GET_XCRS: u64 = 0x8188_AEA6;
const KVM_GET_DEBUGREGS: u64 = 0x8080_AEA1;
const KVM_GET_LAPIC: u64 = 0x8400_AE8E;
const KVM_GET_MP_STATE: u64 = 0x8004_AE98;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_AE9F;
const KVM_GET_MSRS: u64 = 0xC008_AE88;
const KVM_GET_TSC_KHZ: u64 = 0xAEA3;
const KVM_KVMCLOCK_CTRL: u64 = 0xAEAD;
const UFFD_NEW: u64 = 0xAA00;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_COPY: u64 = 0xC028_AA03;
const UFFDIO_ZEROPAGE: u64 = 0xC020_AA04;
const UFFDIO_WAKE: u64 = 0x8010_AA02;
const F_ADD_SEALS: u64 = 1033;
const TCSETS: u64 = 0x5402;
const BLKDISCARD: u64 = 0x1277;
const BLKGETSIZE64: u64 = 0x8008_1272;
const BLKSSZGET: u64 = 0x1268;
/// `IORING_REGISTER_FILES_UPDATE`.
const REGISTER_FILES_UPDATE: u64 = 6;
const TUNSETOFFLOAD: u64 = 0x4004_54D0;
const KVM_GET_API_VERSION: u64 = 0xAE00;
const KVM_CREATE_VM: u64 = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xAE04;
const KVM_GET_SUPPORTED_CPUID: u64 = 0xC008_AE05;
const KVM_CREATE_VCPU: u64 = 0xAE41;
const KVM_SET_TSS_ADDR: u64 = 0xAE47;
const KVM_SET_REGS: u64 = 0x4090_AE82;
const KVM_SET_SREGS: u64 = 0x4138_AE84;
const KVM_SET_MSRS: u64 = 0x4008_AE89;
const KVM_SET_CPUID2: u64 = 0x4008_AE90;
const KVM_ENABLE_CAP: u64 = 0x4068_AEA3;
const TCGETS: u64 = 0x5401;
const TIOCGWINSZ: u64 = 0x5413;
const TUNGETFEATURES: u64 = 0x8004_54CF;
const TUNGETIFF: u64 = 0x8004_54D2;
const TUNSETVNETHDRSZ: u64 = 0x4004_54D8;
const KVM_SET_TSC_KHZ: u64 = 0xAEA2;
const KVM_SET_XCRS: u64 = 0x4188_AEA7;
const KVM_SET_XSAVE: u64 = 0x5000_AEA5;
const KVM_SET_LAPIC: u64 = 0x4400_AE8F;
const KVM_SET_DEBUGREGS: u64 = 0x4080_AEA2;
const KVM_SET_MP_STATE: u64 = 0x4004_AE99;
const KVM_SET_VCPU_EVENTS: u64 = 0x4040_AEA0;
const KVM_SET_CLOCK: u64 = 0x4030_AE7B;
const PR_SET_NAME: u64 = 15;
/// Flags of a new thread: all is shared with the others.
const THREAD: u64 = 0x007D_0F00;
const VHOST_GET_FEATURES: u64 = 0x8008_AF00;
const VHOST_SET_OWNER: u64 = 0xAF01;
const TUNSETQUEUE: u64 = 0x4004_54D9;
const VHOST_SET_FEATURES: u64 = 0x4008_AF00;
const VHOST_SET_MEM_TABLE: u64 = 0x4008_AF03;
const VHOST_SET_VRING_NUM: u64 = 0x4008_AF10;
const VHOST_SET_VRING_ADDR: u64 = 0x4028_AF11;
const VHOST_SET_VRING_BASE: u64 = 0x4008_AF12;
const VHOST_GET_VRING_BASE: u64 = 0xC008_AF12;
const VHOST_SET_VRING_KICK: u64 = 0x4008_AF20;
const VHOST_SET_VRING_CALL: u64 = 0x4008_AF21;
const VHOST_SET_VRING_ERR: u64 = 0x4008_AF22;
const VHOST_NET_SET_BACKEND: u64 = 0x4008_AF30;
/// `AF_UNIX`.
const UNIX: u64 = 1;
/// `FALLOC_FL_PUNCH_HOLE` and `FALLOC_FL_KEEP_SIZE`.
const PUNCH_HOLE: u64 = 3;
/// `FALLOC_FL_ZERO_RANGE` and `FALLOC_FL_KEEP_SIZE`.
const ZERO_RANGE: u64 = 0x11;
// Why the suite of small guests does not reach a row.
const TAP: &str = "net: a tap";
const DISK: &str = "blk: a driver for disks";
const VSOCK: &str = "vsock: a driver for sockets";
const MASKED: &str = "a pending vector is unmasked that was never used";
const ALLOCATOR: &str = "the allocator, at more memory than the suite needs";
const ABORT: &str = "abort";
const CLOCK: &str = "a host whose clock cannot be read without the kernel";
const STOPPED: &str = "a wait that went on after the process was stopped";
/// `PROT_EXEC`.
const EXECUTABLE: u64 = 4;

/// All threads until they have their own filter, besides what these allow. No path can be opened here, no socket made but pairs, no program
/// executed, no other process looked at; what is made are parts of this VM and of this process.
#[rustfmt::skip]
pub const SETUP: &[Row] = &[
    ioctl!(KVM_GET_API_VERSION),
    ioctl!(KVM_CREATE_VM),
    ioctl!(KVM_CHECK_EXTENSION),
    ioctl!(KVM_GET_VCPU_MMAP_SIZE),
    ioctl!(KVM_GET_SUPPORTED_CPUID),
    ioctl!(KVM_CREATE_VCPU),
    ioctl!(KVM_SET_USER_MEMORY_REGION),
    ioctl!(KVM_SET_TSS_ADDR),
    ioctl!(KVM_ENABLE_CAP),
    ioctl!(KVM_SET_CPUID2),
    ioctl!(KVM_SET_MSRS),
    ioctl!(KVM_SET_SREGS),
    ioctl!(KVM_SET_REGS),
    ioctl!(TCGETS),                      // developer front end: the terminal
    unseen(ioctl!(TIOCGWINSZ), "asked of a standard output that is a terminal"),
    unseen(ioctl!(BLKGETSIZE64), "size of a disk that is a block device"),
    unseen(ioctl!(TUNGETFEATURES), TAP),
    unseen(ioctl!(TUNGETIFF), TAP),
    unseen(ioctl!(TUNSETVNETHDRSZ), TAP),
    unseen(ioctl!(VHOST_GET_FEATURES), TAP),
    unseen(ioctl!(VHOST_SET_OWNER), TAP),
    unseen(ioctl!(KVM_SET_TSC_KHZ), "restore on a host with another TSC frequency"),
    ioctl!(KVM_SET_XCRS),                // restore, as the next ones
    ioctl!(KVM_SET_XSAVE),
    ioctl!(KVM_SET_LAPIC),
    ioctl!(KVM_SET_DEBUGREGS),
    ioctl!(KVM_SET_MP_STATE),
    ioctl!(KVM_SET_VCPU_EVENTS),
    ioctl!(KVM_SET_CLOCK),
    ioctl!(UFFD_NEW),                    // restore by page faults, as the next ones
    ioctl!(UFFDIO_API),
    ioctl!(UFFDIO_REGISTER),
    unseen(any(libc::SYS_userfaultfd), "a host without /dev/userfaultfd"),
    any(libc::SYS_memfd_create),         // guest memory
    any(libc::SYS_fcntl),                // seals of it; flags of descriptors
    any(libc::SYS_pread64),              // kernel and initramfs
    any(libc::SYS_fstat),                // are the descriptors what the configuration says?
    unseen(any(libc::SYS_lseek), "size of a disk"),
    unseen(any(libc::SYS_getsockopt), VSOCK),
    any(libc::SYS_fstatfs),              // balloon: page size of guest memory
    any(libc::SYS_sysinfo),              // memory of the host
    any(libc::SYS_epoll_create1),
    any(libc::SYS_signalfd4),
    any(libc::SYS_timerfd_create), // time limits of vsock, statistics of a balloon, rate limits
    any(libc::SYS_io_uring_setup), // disks
    any(libc::SYS_io_uring_register), // disks
    any(libc::SYS_rt_sigaction),
    only(libc::SYS_mprotect, &[(2, EXECUTABLE, Only::Without)]), // the guard below a new stack
    only(libc::SYS_clone, &[(0, THREAD, Only::Equal)]),
    only(libc::SYS_prctl, &[(0, PR_SET_NAME, Only::Equal)]),
    only(libc::SYS_seccomp, &[(0, 1, Only::Equal)]), // the filter of the second phase
];

/// The I/O thread, which is the main thread.
#[rustfmt::skip]
pub const IO: &[Row] = &[
    any(libc::SYS_read),
    any(libc::SYS_write),
    unseen(any(libc::SYS_readv), TAP),
    unseen(any(libc::SYS_writev), TAP),
    any(libc::SYS_pwrite64),
    unseen(any(libc::SYS_preadv), DISK),
    unseen(any(libc::SYS_pwritev), DISK),
    any(libc::SYS_close),
    only(libc::SYS_fcntl, &[(1, 1, Only::Equal)]), // F_GETFD: std looks before it closes, in debug builds
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_poll),                 // standard output is asked before it is written to
    any(libc::SYS_futex),
    unseen(any(libc::SYS_clock_gettime), CLOCK),
    by_chance(any(libc::SYS_restart_syscall), STOPPED),
    any(libc::SYS_rt_sigprocmask),       // musl around thread signals
    any(libc::SYS_tkill),                // pthread_kill: pause vCPU threads
    unseen(any(libc::SYS_gettid), ABORT),
    any(libc::SYS_exit_group),
    unseen(ioctl!(TCSETS), "developer front end: a terminal gets its settings back at exit"),
    unseen(any(libc::SYS_brk), ALLOCATOR),
    any(libc::SYS_munmap),
    unseen(any(libc::SYS_mremap), ALLOCATOR),
    any(libc::SYS_madvise),              // balloon; allocator; what the set-up needed of the stack
    only(libc::SYS_mmap, &[(2, EXECUTABLE, Only::Without)]),
    any(libc::SYS_accept4),              // clients of control socket, console and vsock
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),              // requests and answers with descriptors beside them; vsock
    any(libc::SYS_sendto),
    any(libc::SYS_sendmsg),
    unseen(only(libc::SYS_socketpair, &[(0, UNIX, Only::Equal)]), "vsock: streams that the guest opens"),
    unseen(any(libc::SYS_shutdown), "half-closed vsock streams"),
    any(libc::SYS_getrandom),            // rng device
    unseen(any(libc::SYS_fdatasync), "blk: flush"),
    any(libc::SYS_io_uring_enter), // blk: the ring was made before, restricted to reads, writes and flushes
    only(libc::SYS_fallocate, &[(1, PUNCH_HOLE, Only::Equal)]), // blk: discard
    unseen(only(libc::SYS_fallocate, &[(1, ZERO_RANGE, Only::Equal)]), "blk: write zeroes"),
    unseen(ioctl!(BLKDISCARD), "blk: discard on a block device"),
    only(libc::SYS_io_uring_register, &[(1, REGISTER_FILES_UPDATE, Only::Equal)]), // blk: another backing
    only(libc::SYS_fcntl, &[(1, 3, Only::Equal)]), // blk: F_GETFL of another backing
    unseen(ioctl!(BLKGETSIZE64), "blk: another backing, a disk that grew"),
    unseen(ioctl!(BLKSSZGET), "blk: another backing"),
    unseen(ioctl!(TUNSETOFFLOAD), "net: what its driver agreed to, at each activation"),
    unseen(ioctl!(TUNSETQUEUE), "net: how many queues its driver uses"),
    unseen(ioctl!(VHOST_SET_FEATURES), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_MEM_TABLE), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_VRING_NUM), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_VRING_BASE), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_VRING_ADDR), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_VRING_KICK), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_VRING_CALL), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_SET_VRING_ERR), "net with vhost: its driver is ready"),
    unseen(ioctl!(VHOST_NET_SET_BACKEND), "net with vhost: begins, pauses, ends"),
    unseen(ioctl!(VHOST_GET_VRING_BASE), "net with vhost: where it ended"),
    any(libc::SYS_ftruncate),            // size of a memory file; the console log starts anew
    any(libc::SYS_timerfd_settime), // rate limits and time limits of vsock
    any(libc::SYS_eventfd2),             // a driver enables a queue or uses a vector for the first time
    ioctl!(KVM_IOEVENTFD),               // notifications of a queue
    ioctl!(KVM_IRQFD),                   // a vector is used for the first time
    ioctl!(KVM_SET_GSI_ROUTING),
    unseen(ioctl!(KVM_SIGNAL_MSI), "a serial interrupt that typing raises: a driver that waits for it"),
    ioctl!(KVM_CHECK_EXTENSION),         // snapshot: size of the XSAVE area
    ioctl!(KVM_GET_MSR_INDEX_LIST),      // snapshot: which registers a vCPU has
    ioctl!(KVM_GET_CLOCK),               // snapshot
    ioctl!(KVM_GET_DIRTY_LOG),           // snapshot: pages that the guest wrote
    ioctl!(KVM_SET_USER_MEMORY_REGION),  // fork: writes are logged from then on
    any(libc::SYS_lseek),                // snapshot: where the memory file has data
    any(libc::SYS_mincore),              // snapshot, fork: which pages of anonymous memory are there
    any(libc::SYS_sysinfo),              // snapshot, fork: whether the host swaps
    any(libc::SYS_fstat),                // blk: another size or backing; snapshot: files that were passed are regular
    any(libc::SYS_memfd_create),         // fork: the state that children get
    only(libc::SYS_fcntl, &[(1, F_ADD_SEALS, Only::Equal)]), // fork: nobody changes what children share
];

/// A vCPU thread.
#[rustfmt::skip]
pub const VCPU: &[Row] = &[
    ioctl!(KVM_RUN),
    unseen(ioctl!(KVM_SIGNAL_MSI), "serial interrupt, raised by a register access of a driver that waits for it"),
    unseen(ioctl!(KVM_IOEVENTFD), "the guest moves a BAR"),
    unseen(ioctl!(KVM_IRQFD), MASKED),
    unseen(ioctl!(KVM_SET_GSI_ROUTING), MASKED),
    ioctl!(KVM_GET_REGS),                // where the guest failed; snapshot, as the next ones
    ioctl!(KVM_GET_SREGS),
    unseen(ioctl!(KVM_GET_XSAVE), "a host without KVM_CAP_XSAVE2"),
    ioctl!(KVM_GET_XSAVE2),
    ioctl!(KVM_GET_XCRS),
    ioctl!(KVM_GET_DEBUGREGS),
    ioctl!(KVM_GET_LAPIC),
    ioctl!(KVM_GET_MP_STATE),
    ioctl!(KVM_GET_VCPU_EVENTS),
    ioctl!(KVM_GET_MSRS),
    ioctl!(KVM_GET_TSC_KHZ),
    ioctl!(KVM_KVMCLOCK_CTRL),           // after a pause: the guest's watchdogs shall not take it for a lock-up
    unseen(any(libc::SYS_eventfd2), MASKED),
    any(libc::SYS_write),                // wakes the I/O thread
    unseen(any(libc::SYS_writev), "a panic's message"),
    unseen(any(libc::SYS_close), MASKED),
    unseen(only(libc::SYS_fcntl, &[(1, 1, Only::Equal)]), "F_GETFD: std looks before it closes, in debug builds"),
    any(libc::SYS_futex),
    unseen(any(libc::SYS_clock_gettime), CLOCK),
    by_chance(any(libc::SYS_restart_syscall), STOPPED),
    any(libc::SYS_rt_sigreturn),
    unseen(any(libc::SYS_rt_sigprocmask), ABORT),
    unseen(any(libc::SYS_tkill), ABORT),
    unseen(any(libc::SYS_gettid), ABORT),
    unseen(any(libc::SYS_exit_group), "after a forbidden call"),
    unseen(any(libc::SYS_brk), ALLOCATOR),
    any(libc::SYS_munmap),
    unseen(any(libc::SYS_mremap), ALLOCATOR),
    unseen(any(libc::SYS_madvise), ALLOCATOR),
    only(libc::SYS_mmap, &[(2, EXECUTABLE, Only::Without)]),
];

/// The thread that answers page faults.
#[rustfmt::skip]
pub const PAGER: &[Row] = &[
    ioctl!(UFFDIO_COPY),
    unseen(ioctl!(UFFDIO_ZEROPAGE), "a page that the VM gave back before"),
    by_chance(ioctl!(UFFDIO_WAKE), "two vCPUs that touch a page at once"),
    any(libc::SYS_read),                 // faults
    any(libc::SYS_poll),
    any(libc::SYS_pread64),              // the memory file
    unseen(any(libc::SYS_write), "the memory file ends too early"),
    unseen(any(libc::SYS_writev), "a panic's message"),
    by_chance(any(libc::SYS_futex), "a lock that another thread holds; as write"),
    by_chance(any(libc::SYS_restart_syscall), STOPPED),
    unseen(any(libc::SYS_rt_sigprocmask), ABORT),
    unseen(any(libc::SYS_tkill), ABORT),
    unseen(any(libc::SYS_gettid), ABORT),
    unseen(any(libc::SYS_exit), "the thread ends when it cannot go on"),
    unseen(any(libc::SYS_exit_group), "after a forbidden call"),
    unseen(any(libc::SYS_close), "as exit"),
    unseen(only(libc::SYS_fcntl, &[(1, 1, Only::Equal)]), "as exit"),
    unseen(any(libc::SYS_brk), ALLOCATOR),
    unseen(any(libc::SYS_munmap), ALLOCATOR),
    unseen(any(libc::SYS_mremap), ALLOCATOR),
    unseen(any(libc::SYS_madvise), ALLOCATOR),
    unseen(only(libc::SYS_mmap, &[(2, EXECUTABLE, Only::Without)]), ALLOCATOR),
];
