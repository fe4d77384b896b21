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
}

const fn any(call: i64) -> Row {
    Row { call, only: &[] }
}

const fn only(call: i64, only: &'static [(u8, u64, Only)]) -> Row {
    Row { call, only }
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
/// `FALLOC_FL_PUNCH_HOLE` and `FALLOC_FL_KEEP_SIZE`.
const PUNCH_HOLE: u64 = 3;
/// `FALLOC_FL_ZERO_RANGE` and `FALLOC_FL_KEEP_SIZE`.
const ZERO_RANGE: u64 = 0x11;
/// `PROT_EXEC`.
const EXECUTABLE: u64 = 4;

/// The I/O thread, which is the main thread.
#[rustfmt::skip]
pub const IO: &[Row] = &[
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
    any(libc::SYS_pread64),
    any(libc::SYS_pwrite64),
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_close),
    only(libc::SYS_fcntl, &[(1, 1, Only::Equal)]), // F_GETFD: std looks before it closes, in debug builds
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_poll),                 // standard output is asked before it is written to
    any(libc::SYS_futex),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),       // musl around thread signals
    any(libc::SYS_tkill),                // pthread_kill: pause vCPU threads
    any(libc::SYS_gettid),               // abort
    any(libc::SYS_exit_group),
    any(libc::SYS_sigaltstack),          // std frees the stack of its overflow handler at exit
    ioctl!(TCSETS),                      // developer front end: the terminal gets its settings back at exit
    any(libc::SYS_brk),                  // allocator
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    only(libc::SYS_mmap, &[(2, EXECUTABLE, Only::Without)]),
    any(libc::SYS_accept4),              // clients of control socket, console and vsock
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_sendmsg),
    any(libc::SYS_shutdown),             // half-closed vsock streams
    any(libc::SYS_getrandom),            // rng device
    any(libc::SYS_fdatasync),            // blk: flush
    any(libc::SYS_io_uring_enter),       // blk: the ring was made before, restricted to reads, writes and flushes
    only(libc::SYS_fallocate, &[(1, PUNCH_HOLE, Only::Equal)]), // blk: discard
    only(libc::SYS_fallocate, &[(1, ZERO_RANGE, Only::Equal)]), // blk: write zeroes
    ioctl!(BLKDISCARD),                  // blk: discard on a block device
    only(libc::SYS_io_uring_register, &[(1, REGISTER_FILES_UPDATE, Only::Equal)]), // blk: another backing
    only(libc::SYS_fcntl, &[(1, 3, Only::Equal)]), // blk: F_GETFL of another backing
    ioctl!(BLKGETSIZE64),
    ioctl!(BLKSSZGET),
    ioctl!(TUNSETOFFLOAD),               // net: what its driver agreed to, at each activation
    any(libc::SYS_ftruncate),            // the console log starts anew
    any(libc::SYS_timerfd_settime),      // rate limits
    any(libc::SYS_eventfd2),             // a driver enables a queue or uses a vector for the first time
    ioctl!(KVM_IOEVENTFD),               // notifications of a queue
    ioctl!(KVM_IRQFD),                   // a vector is used for the first time
    ioctl!(KVM_SET_GSI_ROUTING),
    ioctl!(KVM_SIGNAL_MSI),              // serial interrupt
    ioctl!(KVM_CHECK_EXTENSION),         // snapshot: size of the XSAVE area
    ioctl!(KVM_GET_MSR_INDEX_LIST),      // snapshot: which registers a vCPU has
    ioctl!(KVM_GET_CLOCK),               // snapshot
    ioctl!(KVM_GET_DIRTY_LOG),           // snapshot: pages that the guest wrote
    ioctl!(KVM_SET_USER_MEMORY_REGION),  // fork: writes are logged from then on
    any(libc::SYS_lseek),                // snapshot: where the memory file has data
    any(libc::SYS_fstat),                // blk: another size or backing; snapshot: files that were passed are regular
    any(libc::SYS_memfd_create),         // fork: the state that children get
    only(libc::SYS_fcntl, &[(1, F_ADD_SEALS, Only::Equal)]), // fork: nobody changes what children share
];

/// A vCPU thread.
#[rustfmt::skip]
pub const VCPU: &[Row] = &[
    ioctl!(KVM_RUN),
    ioctl!(KVM_SIGNAL_MSI),              // serial interrupt, raised by a register access
    ioctl!(KVM_IOEVENTFD),               // the guest moves a BAR
    ioctl!(KVM_IRQFD),                   // a pending vector is unmasked that was never used
    ioctl!(KVM_SET_GSI_ROUTING),
    ioctl!(KVM_GET_REGS),                // where the guest failed; snapshot, as the next ones
    ioctl!(KVM_GET_SREGS),
    ioctl!(KVM_GET_XSAVE),
    ioctl!(KVM_GET_XSAVE2),
    ioctl!(KVM_GET_XCRS),
    ioctl!(KVM_GET_DEBUGREGS),
    ioctl!(KVM_GET_LAPIC),
    ioctl!(KVM_GET_MP_STATE),
    ioctl!(KVM_GET_VCPU_EVENTS),
    ioctl!(KVM_GET_MSRS),
    ioctl!(KVM_GET_TSC_KHZ),
    ioctl!(KVM_KVMCLOCK_CTRL),           // after a pause: the guest's watchdogs shall not take it for a lock-up
    any(libc::SYS_eventfd2),             // as KVM_IRQFD
    any(libc::SYS_read),
    any(libc::SYS_write),                // wakes the I/O thread
    any(libc::SYS_writev),               // a panic's message
    any(libc::SYS_close),
    only(libc::SYS_fcntl, &[(1, 1, Only::Equal)]), // F_GETFD: std looks before it closes, in debug builds
    any(libc::SYS_futex),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_tkill),                // abort
    any(libc::SYS_gettid),
    any(libc::SYS_exit_group),
    any(libc::SYS_brk),                  // allocator
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    only(libc::SYS_mmap, &[(2, EXECUTABLE, Only::Without)]),
];

/// The thread that answers page faults.
#[rustfmt::skip]
pub const PAGER: &[Row] = &[
    ioctl!(UFFDIO_COPY),
    ioctl!(UFFDIO_ZEROPAGE),
    ioctl!(UFFDIO_WAKE),
    any(libc::SYS_read),                 // faults
    any(libc::SYS_poll),
    any(libc::SYS_pread64),              // the memory file
    any(libc::SYS_write),                // tells the I/O thread that it cannot go on
    any(libc::SYS_writev),               // a panic's message
    any(libc::SYS_futex),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_tkill),                // abort
    any(libc::SYS_gettid),
    any(libc::SYS_exit),                 // the thread ends when it cannot go on
    any(libc::SYS_exit_group),
    any(libc::SYS_sigaltstack),          // std, at the end of a thread
    any(libc::SYS_close),
    only(libc::SYS_fcntl, &[(1, 1, Only::Equal)]), // F_GETFD: std looks before it closes, in debug builds
    any(libc::SYS_brk),                  // allocator
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    only(libc::SYS_mmap, &[(2, EXECUTABLE, Only::Without)]),
];
