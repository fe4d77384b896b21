//! The run loop of a vCPU thread, and how it is paused.
//!
//! A thread that shall stop running the guest gets a signal. Its handler sets `immediate_exit` of the thread's own
//! `kvm_run`, so that a signal which comes just before `KVM_RUN` is not lost: the thread clears the field, then looks at
//! what is wanted ([`crate::gate`]), then enters the guest.

use std::cell::Cell;
use std::ffi::c_int;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use blixard_vmm_api::ExitReason;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::arch::x86_64::cpuid::Template;
use crate::arch::x86_64::registers::{self, Entry};
use crate::arch::x86_64::vcpu_state::{self, HostState, VcpuState, VcpuStateError};
use crate::bus::Bus;
use crate::flight::{self, What};
use crate::gate::Gate;
use crate::mailbox::Message;
use crate::sandbox::{self, SandboxError};
use crate::times::Moment;
use crate::vcpu_stats::VcpuStats;

/// Stack of a vCPU thread in bytes; only what is used takes memory.
const STACK: usize = 128 << 10;

/// Why a vCPU cannot start.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The kernel refuses a part of its state.
    #[error("vCPU {index}: {call}")]
    State {
        /// Which vCPU.
        index: u8,
        /// The call.
        call: &'static str,
        /// The system's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A list for the kernel is too long.
    #[error("vCPU {0}: list of CPUID leaves or registers")]
    List(u8),
    /// There is no thread for it.
    #[error("vCPU {index}: thread")]
    Thread {
        /// Which vCPU.
        index: u8,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Its filter cannot be applied.
    #[error("vCPU {index}")]
    Sandbox {
        /// Which vCPU.
        index: u8,
        /// What went wrong.
        #[source]
        source: SandboxError,
    },
    /// It cannot be told what a baseline promises.
    #[error("vCPU {index}")]
    Promise {
        /// Which vCPU.
        index: u8,
        /// What went wrong.
        #[source]
        source: VcpuStateError,
    },
    /// Its state cannot be read.
    #[error("vCPU {index}")]
    Snapshot {
        /// Which vCPU.
        index: u8,
        /// What went wrong.
        #[source]
        source: VcpuStateError,
    },
    /// The VM is about to end.
    #[error("a vCPU has ended")]
    Ended,
    /// The signal that stops vCPUs cannot be caught.
    #[error("signal handler")]
    Signal(#[source] io::Error),
}

thread_local! {
    /// `immediate_exit` of this thread's vCPU, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int) {
    let target = IMMEDIATE_EXIT.get();
    if !target.is_null() {
        // SAFETY: the pointer is to the mapped `kvm_run` of this very thread, which sets it after it got its vCPU and
        // clears it before it gives the vCPU up. The kernel reads the field; no reference to it is alive on entry to
        // `KVM_RUN`, and a volatile write of a byte is atomic for a handler on the same thread.
        unsafe { ptr::write_volatile(target, 1) };
    }
}

fn kick_signal() -> c_int {
    libc::SIGRTMIN()
}

/// Catches the signal that interrupts vCPU threads.
///
/// # Errors
/// The system's answer.
pub fn catch_kicks() -> Result<(), VcpuError> {
    // SAFETY: an all-zero sigaction is valid: no flags, empty mask, default action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(c_int) = on_kick;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: the structure is filled; the handler only touches its own thread's memory.
    match unsafe { libc::sigaction(kick_signal(), &raw const action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(VcpuError::Signal(io::Error::last_os_error())),
    }
}

/// A state that was asked for.
type Saved = Result<VcpuState, VcpuError>;

/// What a vCPU begins with.
#[derive(Clone)]
pub enum Begin {
    /// The entry into a kernel.
    Kernel(Arc<Template>, Entry),
    /// A state that it already has.
    Restored,
}

/// All vCPU threads of the VM.
pub struct Vcpus {
    gate: Arc<Gate<HostState, Saved>>,
    stats: Vec<Arc<VcpuStats>>,
    threads: Vec<JoinHandle<()>>,
}

/// How an exit ends the VM.
enum End {
    Reason(ExitReason),
    /// What the guest did.
    Fault(String),
    /// `KVM_RUN` failed.
    Run(kvm_ioctls::Error),
}

/// What a vCPU thread is made of.
struct Vcpu {
    fd: VcpuFd,
    index: u8,
    bus: Arc<Bus>,
    gate: Arc<Gate<HostState, Saved>>,
    stats: Arc<VcpuStats>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. Each sets its registers up, puts on its filter and waits for [`Self::resume`].
    ///
    /// # Errors
    /// A thread cannot be made. What goes wrong inside it arrives as [`Message::Exit`].
    pub fn start(fds: Vec<VcpuFd>, begin: &Begin, bus: &Arc<Bus>, log_only: bool) -> Result<Self, VcpuError> {
        let gate = Arc::new(Gate::new());
        let mut threads = Vec::with_capacity(fds.len());
        let mut stats = Vec::with_capacity(fds.len());
        for (index, fd) in (0..).zip(fds) {
            let own = Arc::new(VcpuStats::default());
            let mut vcpu = Vcpu { fd, index, bus: bus.clone(), gate: gate.clone(), stats: own.clone() };
            stats.push(own);
            let begin = begin.clone();
            let body = move || {
                let ready = vcpu.set_up(&begin).and_then(|()| {
                    drop(begin);
                    let filtered = sandbox::enter_vcpu(log_only);
                    filtered.map_err(|source| VcpuError::Sandbox { index, source })
                });
                let reason = match ready {
                    Ok(()) => vcpu.run(),
                    Err(error) => ExitReason::HostProblem { detail: crate::chain(&error) },
                };
                vcpu.bus.mailbox.post(Message::Exit(reason));
                // The others may go on until the process ends; a pause does not wait for this one.
                vcpu.gate.end();
                park_for_ever();
            };
            let builder = thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK);
            threads.push(builder.spawn(body).map_err(|source| VcpuError::Thread { index, source })?);
        }
        Ok(Self { gate, stats, threads })
    }

    /// What each thread counts, by vCPU.
    pub fn stats(&self) -> &[Arc<VcpuStats>] {
        &self.stats
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.gate.set(false);
    }

    /// Stops all vCPUs and waits until they have stopped.
    pub fn pause(&self) {
        self.gate.set(true);
        for thread in &self.threads {
            // SAFETY: the handle was not joined, so the thread id is valid, also when the thread has ended.
            unsafe { libc::pthread_kill(thread.as_pthread_t() as libc::pthread_t, kick_signal()) };
        }
        self.gate.wait_for(self.threads.len());
    }

    /// The states of all vCPUs, which are paused.
    ///
    /// # Errors
    /// The kernel refuses, or a vCPU has ended.
    pub fn save(&self, host: HostState) -> Result<Vec<VcpuState>, VcpuError> {
        let saved = self.gate.save(self.threads.len(), host).ok_or(VcpuError::Ended)?;
        saved.into_iter().collect()
    }
}

/// A thread that has ended stays until the process does: it can be kicked like the others.
fn park_for_ever() -> ! {
    loop {
        thread::park();
    }
}

/// What the flight recorder says of a vCPU that ended.
fn ended(reason: &ExitReason) -> &'static str {
    match reason {
        ExitReason::PowerOff => "power-off",
        ExitReason::Reset => "reset",
        ExitReason::GuestFault { .. } => "fault",
        _ => "failed",
    }
}

impl Vcpu {
    fn set_up(&mut self, begin: &Begin) -> Result<(), VcpuError> {
        if let Begin::Kernel(template, entry) = begin {
            self.enter(template, *entry)?;
        }
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        Ok(())
    }

    fn enter(&self, template: &Template, entry: Entry) -> Result<(), VcpuError> {
        let index = self.index;
        let failed = |call| move |source| VcpuError::State { index, call, source };
        let list = |_| VcpuError::List(index);
        self.fd.set_cpuid2(&template.for_vcpu(index).map_err(list)?).map_err(failed("KVM_SET_CPUID2"))?;
        self.fd.set_msrs(&registers::msrs().map_err(list)?).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(promised) = template.arch_capabilities() {
            vcpu_state::tell_arch_capabilities(&self.fd, promised)
                .map_err(|source| VcpuError::Promise { index, source })?;
        }
        if index == 0 {
            self.fd.set_sregs(&registers::special(entry)).map_err(failed("KVM_SET_SREGS"))?;
            self.fd.set_regs(&registers::general(entry)).map_err(failed("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    /// Runs the guest until it ends.
    fn run(&mut self) -> ExitReason {
        let reason = self.run_until_end();
        flight::note(What::Vcpu(self.index), ended(&reason));
        IMMEDIATE_EXIT.set(ptr::null_mut());
        reason
    }

    fn run_until_end(&mut self) -> ExitReason {
        self.park();
        if self.index == 0 {
            self.bus.times.note(Moment::VcpuStart);
        }
        loop {
            self.fd.set_kvm_immediate_exit(0);
            if self.gate.is_held() {
                if let Some(reason) = self.complete() {
                    return reason;
                }
                self.park();
                // The guest's watchdogs shall not take the pause for a lock-up. A guest without kvmclock has none to be told.
                let _ = self.fd.kvmclock_ctrl();
                continue;
            }
            if let Some(reason) = self.step() {
                return reason;
            }
        }
    }

    fn park(&self) {
        let index = self.index;
        let save = |host: &HostState| {
            VcpuState::get(&self.fd, host).map_err(|source| VcpuError::Snapshot { index, source })
        };
        self.gate.park(index, &save);
    }

    /// Completes the last exit without running the guest: what it read from a device is in its registers only after the next
    /// entry. The reason when that ends the VM.
    fn complete(&mut self) -> Option<ExitReason> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.fd.run() {
                Err(error) if error.errno() == libc::EINTR => return None,
                result => {
                    // An access over a page border has a second part.
                    if let Some(reason) = Self::handle(&self.bus, result) {
                        return Some(self.ended(reason));
                    }
                }
            }
        }
    }

    /// Runs the guest until its next exit; the reason when that ends the VM.
    fn step(&mut self) -> Option<ExitReason> {
        let result = self.fd.run();
        let timed = self.stats.count(&result);
        let end = Self::handle(&self.bus, result);
        if let Some(begin) = timed {
            self.stats.handled(begin);
        }
        end.map(|end| self.ended(end))
    }

    fn handle(bus: &Bus, result: Result<VcpuExit<'_>, kvm_ioctls::Error>) -> Option<End> {
        match result {
            Ok(VcpuExit::IoOut(port, data)) => return bus.port_write(port, data).map(End::Reason),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => bus.memory_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.memory_write(address, data),
            Ok(VcpuExit::Intr | VcpuExit::IoapicEoi(_) | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                return Some(End::Reason(ExitReason::PowerOff));
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                return Some(End::Reason(ExitReason::Reset));
            }
            Ok(VcpuExit::Shutdown) => return Some(End::Fault("triple fault".into())),
            Ok(VcpuExit::InternalError) => {
                return Some(End::Fault("KVM cannot emulate an instruction".into()));
            }
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Some(End::Fault(format!("the processor refuses its state ({reason:#x})")));
            }
            Ok(other) => return Some(End::Fault(format!("unexpected exit {other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Some(End::Run(error)),
        }
        None
    }

    fn ended(&self, end: End) -> ExitReason {
        match end {
            End::Reason(reason) => reason,
            End::Fault(what) => self.fault(&what),
            End::Run(error) => {
                ExitReason::Internal { detail: format!("KVM_RUN of vCPU {}: {error}", self.index) }
            }
        }
    }

    fn fault(&self, what: &str) -> ExitReason {
        let place = self.fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at {:#x}", regs.rip));
        ExitReason::GuestFault { detail: format!("vCPU {}: {what}{place}", self.index) }
    }
}
