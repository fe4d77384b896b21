//! The run loop of a vCPU thread, and how it is paused.
//!
//! A thread that shall stop running the guest gets a signal. Its handler sets `immediate_exit` of the thread's own
//! `kvm_run`, so that a signal which comes just before `KVM_RUN` is not lost: the thread clears the field, then looks at
//! what is wanted, then enters the guest.

use std::cell::Cell;
use std::ffi::c_int;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use blixard_vmm_api::ExitReason;
use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::arch::x86_64::cpuid::Template;
use crate::arch::x86_64::registers::{self, Entry};
use crate::bus::Bus;
use crate::mailbox::Message;
use crate::sandbox::{self, SandboxError};
use crate::times::Moment;

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

#[derive(Default)]
struct Parked {
    hold: bool,
    waiting: usize,
}

/// Holds all vCPUs, or lets them run. At the beginning they are held.
pub struct Gate {
    /// Copy of `Parked::hold` that is cheap to look at.
    hold: AtomicBool,
    parked: Mutex<Parked>,
    changed: Condvar,
}

impl Gate {
    fn new() -> Self {
        let parked = Mutex::new(Parked { hold: true, waiting: 0 });
        Self { hold: AtomicBool::new(true), parked, changed: Condvar::new() }
    }

    fn set(&self, hold: bool) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        parked.hold = hold;
        self.hold.store(hold, Ordering::SeqCst);
        drop(parked);
        self.changed.notify_all();
    }

    /// What a vCPU thread does while held.
    fn pass(&self) {
        if !self.hold.load(Ordering::SeqCst) {
            return;
        }
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        parked.waiting += 1;
        self.changed.notify_all();
        while parked.hold {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        parked.waiting -= 1;
    }

    /// Waits until `count` threads are held.
    fn wait_for(&self, count: usize) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        while parked.waiting < count {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// All vCPU threads of the VM.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

/// What a vCPU thread is made of.
struct Vcpu {
    fd: VcpuFd,
    index: u8,
    bus: Arc<Bus>,
    gate: Arc<Gate>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. Each sets its registers up, puts on its filter and waits for [`Self::resume`].
    ///
    /// # Errors
    /// A thread cannot be made. What goes wrong inside it arrives as [`Message::Exit`].
    pub fn start(
        fds: Vec<VcpuFd>,
        template: Template,
        entry: Entry,
        bus: &Arc<Bus>,
        log_only: bool,
    ) -> Result<Self, VcpuError> {
        let gate = Arc::new(Gate::new());
        let template = Arc::new(template);
        let mut threads = Vec::with_capacity(fds.len());
        for (index, fd) in (0..).zip(fds) {
            let mut vcpu = Vcpu { fd, index, bus: bus.clone(), gate: gate.clone() };
            let template = template.clone();
            let body = move || {
                let ready = vcpu.set_up(&template, entry).and_then(|()| {
                    drop(template);
                    let filtered = sandbox::enter_vcpu(log_only);
                    filtered.map_err(|source| VcpuError::Sandbox { index, source })
                });
                let reason = match ready {
                    Ok(()) => vcpu.run(),
                    Err(error) => ExitReason::HostProblem { detail: crate::chain(&error) },
                };
                vcpu.bus.mailbox.post(Message::Exit(reason));
                // The others may go on until the process ends; a pause still waits for this one.
                vcpu.gate.park_for_ever();
            };
            let builder = thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK);
            threads.push(builder.spawn(body).map_err(|source| VcpuError::Thread { index, source })?);
        }
        Ok(Self { gate, threads })
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
}

impl Gate {
    fn park_for_ever(&self) -> ! {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        parked.waiting += 1;
        self.changed.notify_all();
        loop {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Vcpu {
    fn set_up(&mut self, template: &Template, entry: Entry) -> Result<(), VcpuError> {
        let index = self.index;
        let failed = |call| move |source| VcpuError::State { index, call, source };
        let list = |_| VcpuError::List(index);
        self.fd.set_cpuid2(&template.for_vcpu(index).map_err(list)?).map_err(failed("KVM_SET_CPUID2"))?;
        self.fd.set_msrs(&registers::msrs().map_err(list)?).map_err(failed("KVM_SET_MSRS"))?;
        if index == 0 {
            self.fd.set_sregs(&registers::special(entry)).map_err(failed("KVM_SET_SREGS"))?;
            self.fd.set_regs(&registers::general(entry)).map_err(failed("KVM_SET_REGS"))?;
        }
        IMMEDIATE_EXIT.set(&raw mut self.fd.get_kvm_run().immediate_exit);
        Ok(())
    }

    /// Runs the guest until it ends.
    fn run(&mut self) -> ExitReason {
        let reason = self.run_until_end();
        IMMEDIATE_EXIT.set(ptr::null_mut());
        reason
    }

    fn run_until_end(&mut self) -> ExitReason {
        self.gate.pass();
        if self.index == 0 {
            self.bus.times.note(Moment::VcpuStart);
        }
        loop {
            self.fd.set_kvm_immediate_exit(0);
            self.gate.pass();
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    if let Some(reason) = self.bus.port_write(port, data) {
                        return reason;
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.bus.memory_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.bus.memory_write(address, data),
                Ok(VcpuExit::Intr | VcpuExit::IoapicEoi(_) | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return ExitReason::PowerOff,
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return ExitReason::Reset,
                Ok(VcpuExit::Shutdown) => return self.fault("triple fault"),
                Ok(VcpuExit::InternalError) => return self.fault("KVM cannot emulate an instruction"),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return self.fault(&format!("the processor refuses its state ({reason:#x})"));
                }
                Ok(other) => {
                    let what = format!("unexpected exit {other:?}");
                    return self.fault(&what);
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(error) => {
                    return ExitReason::Internal {
                        detail: format!("KVM_RUN of vCPU {}: {error}", self.index),
                    };
                }
            }
        }
    }

    fn fault(&self, what: &str) -> ExitReason {
        let place = self.fd.get_regs().map_or_else(|_| String::new(), |regs| format!(" at {:#x}", regs.rip));
        ExitReason::GuestFault { detail: format!("vCPU {}: {what}{place}", self.index) }
    }
}
