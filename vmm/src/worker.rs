//! The I/O thread: one epoll loop in which every device, the console and the control socket live.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use blixard_vmm_api::control::{Event, FromVmm, Phase, Reply, Request, Status};
use blixard_vmm_api::guest::{LinkRecord, WorkloadExit};
use blixard_vmm_api::health::Health;
use blixard_vmm_api::stats::FlightEvent;
use blixard_vmm_api::{ExitReason, VmId};

use crate::arch::x86_64::cpuid::Template;
use crate::bus::Bus;
use crate::control::{Answer, Answered, Control};
use crate::devices::console::Console;
use crate::flight::{self, What};
use crate::kvm::Vm;
use crate::mailbox::Message;
use crate::memory::dirty::DirtyMap;
use crate::memory::ram::Ram;
use crate::poll::{DeviceWatch, Owner, Poll};
use crate::stats::Samples;
use crate::times::{Moment, Times, now_us};
use crate::vcpu::Vcpus;
use crate::virtio::device::{Activation, Device, DeviceRequest};
use crate::virtio::transport::Transport;

mod at_rest;

const IN: u32 = libc::EPOLLIN.cast_unsigned();
/// A kick wakes once and its count is never read: that saves a system call for each. A device looks at its whole queue, or
/// asks for another turn.
const KICK: u32 = IN | libc::EPOLLET.cast_unsigned();
/// Longest reason of a device's failure in an exit record, in characters.
const FAILURE_CHARS_MAX: usize = 200;

/// What the guest's init told over the guest link.
#[derive(Debug, Default)]
pub struct GuestNews {
    ready: bool,
    workload: Option<WorkloadExit>,
    problem: Option<String>,
    health: Option<Health>,
    fresh: bool,
}

/// The guest's news, written by the vsock device and read by the control socket; both live in the I/O thread.
#[derive(Clone, Default)]
pub struct Guest(Arc<Mutex<GuestNews>>);

impl Guest {
    fn with<R>(&self, act: impl FnOnce(&mut GuestNews) -> R) -> R {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes a record of the guest link. A workload ends once, and init gives up once: what a guest says of that again is not
    /// told to anybody, since each change goes as far as the cluster's log.
    pub fn on_record(&self, record: LinkRecord, times: &Times) {
        self.with(|news| {
            let is_new = match record {
                LinkRecord::Started => times.note(Moment::InitStart),
                LinkRecord::Ready => {
                    times.note(Moment::GuestReady);
                    !std::mem::replace(&mut news.ready, true)
                }
                LinkRecord::WorkloadExited(exit) => first(&mut news.workload, exit),
                LinkRecord::Problem(text) => first(&mut news.problem, text),
                LinkRecord::Health(health) => {
                    let is_new = news.health.as_ref() != Some(&health);
                    news.health = Some(health);
                    is_new
                }
                LinkRecord::Stop | LinkRecord::Restored(_) => false,
            };
            news.fresh |= is_new;
        });
    }

    /// What a snapshot knew of the guest.
    pub fn restore(&self, ready: bool) {
        self.with(|news| news.ready = ready);
    }

    /// How the workload ended, and what init says went wrong.
    pub fn outcome(&self) -> (Option<WorkloadExit>, Option<String>) {
        self.with(|news| (news.workload, news.problem.clone()))
    }
}

/// Keeps the first value; true when this is it.
fn first<T>(kept: &mut Option<T>, value: T) -> bool {
    let is_first = kept.is_none();
    kept.get_or_insert(value);
    is_first
}

/// How the guest is asked to stop.
pub type AskStop = Box<dyn Fn() + Send>;

/// A device and its registers.
pub struct Slot {
    /// Prefix of its counters, for example `blk.root`.
    pub name: String,
    /// The device.
    pub device: Box<dyn Device>,
    /// Its registers.
    pub transport: Arc<Transport>,
    /// Whether the device has been activated and not yet deactivated.
    pub active: bool,
}

/// What requests act on.
struct Machine {
    vm: VmId,
    phase: Phase,
    kvm: Vm,
    template: Arc<Template>,
    vcpus: Vcpus,
    slots: Vec<Slot>,
    ram: Ram,
    bus: Arc<Bus>,
    guest: Guest,
    ask_stop: Option<AskStop>,
    tell_restored: Option<AskStop>,
    /// Pages that were used since a restore, when they are noted.
    used: Option<Arc<DirtyMap>>,
    exit: Option<ExitReason>,
    console_counters: Vec<(&'static str, u64)>,
    changed: bool,
}

/// The loop and all that lives in it.
pub struct Worker {
    poll: Poll,
    console: Console,
    control: Option<Control>,
    signals: OwnedFd,
    restored: Option<bool>,
    machine: Machine,
}

/// What the loop is made of.
pub struct Parts {
    /// Identity.
    pub vm: VmId,
    /// The epoll set, in which console and control socket are registered.
    pub poll: Poll,
    /// The console.
    pub console: Console,
    /// The control socket.
    pub control: Option<Control>,
    /// A signalfd: any signal ends the VM.
    pub signals: OwnedFd,
    /// The VM in the kernel.
    pub kvm: Vm,
    /// What vCPUs are promised.
    pub template: Arc<Template>,
    /// vCPU threads, held.
    pub vcpus: Vcpus,
    /// Devices.
    pub slots: Vec<Slot>,
    /// Guest memory.
    pub ram: Ram,
    /// What vCPUs reach.
    pub bus: Arc<Bus>,
    /// The guest's news.
    pub guest: Guest,
    /// Asks the guest to stop, when there is a way.
    pub ask_stop: Option<AskStop>,
    /// Tells the guest who it is now, when there is a way.
    pub tell_restored: Option<AskStop>,
    /// Pages that were used since a restore, when they are noted.
    pub used: Option<Arc<DirtyMap>>,
    /// The VM comes from a snapshot; true when it is paused at first.
    pub restored: Option<bool>,
}

impl Worker {
    /// A loop that has not begun.
    ///
    /// # Errors
    /// Something cannot be watched.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let Parts { vm, mut poll, console, control, signals, restored, .. } = parts;
        let Parts { kvm, template, vcpus, slots, ram, bus, guest, ask_stop, tell_restored, used, .. } = parts;
        poll.add(Owner::Mailbox, bus.mailbox.as_raw_fd(), IN, 0)?;
        poll.add(Owner::Signals, signals.as_raw_fd(), IN, 0)?;
        let machine = Machine {
            vm,
            phase: Phase::Running,
            kvm,
            template,
            vcpus,
            slots,
            ram,
            bus,
            guest,
            ask_stop,
            tell_restored,
            used,
            exit: None,
            console_counters: vec![],
            changed: false,
        };
        Ok(Self { poll, console, control, signals, restored, machine })
    }

    /// Lets the guest run and serves it until it ends.
    pub fn run(&mut self) -> ExitReason {
        flight::note(What::Vm, "started");
        if let Some(paused) = self.restored {
            self.machine.wake(&mut self.poll, paused);
        } else {
            self.machine.vcpus.resume();
        }
        let mut ready = vec![];
        let reason = loop {
            if let Some(reason) = self.machine.exit.take() {
                break reason;
            }
            if let Err(error) = self.poll.wait(-1, &mut ready) {
                break ExitReason::Internal { detail: format!("epoll_wait: {error}") };
            }
            for (fd, events) in &ready {
                if let Some((owner, token)) = self.poll.owner(*fd) {
                    self.dispatch(owner, token, *events);
                }
            }
            self.tell_news();
        };
        self.console.finish(&mut self.poll);
        if let Some(control) = &mut self.control {
            control.tell(&FromVmm::Event(Event::Exited(reason.clone())), &mut self.poll);
        }
        reason
    }

    /// The last events, for a VM that ended abnormally.
    pub fn flight_events(&self) -> Vec<FlightEvent> {
        self.machine.flight_events()
    }

    fn dispatch(&mut self, owner: Owner, token: u64, events: u32) {
        let Self { poll, console, control, machine, .. } = self;
        match owner {
            Owner::Mailbox => {
                for message in machine.bus.mailbox.take() {
                    match message {
                        Message::Serial => {
                            machine.changed |=
                                console.counters().first().is_some_and(|(_, bytes)| *bytes == 0);
                            console.on_serial(poll);
                        }
                        other => machine.on_message(other, poll),
                    }
                }
            }
            Owner::Signals => {
                flight::note(What::Vm, "signal");
                machine.exit.get_or_insert(ExitReason::Killed);
                // Reading takes the signal; what it was does not matter.
                drop(read_signal(&self.signals));
            }
            Owner::Console => console.on_event(token, poll),
            Owner::Control => {
                if let Some(control) = control {
                    machine.console_counters = console.counters().to_vec();
                    control.on_event(token, poll, machine);
                }
            }
            Owner::Device(index) => {
                if let Some(slot) = machine.slots.get_mut(index).filter(|slot| slot.active) {
                    slot.device.on_event(token, events, &mut DeviceWatch { poll, device: index });
                }
            }
            Owner::Kick(index) => {
                let slot = machine.slots.get_mut(index).filter(|slot| slot.active);
                if let (Some(slot), Ok(queue)) = (slot, u16::try_from(token)) {
                    slot.device.on_kick(queue, &mut DeviceWatch { poll, device: index });
                }
            }
        }
    }

    fn tell_news(&mut self) {
        let fresh = self.machine.guest.with(|news| std::mem::take(&mut news.fresh));
        let changed = std::mem::take(&mut self.machine.changed);
        if let Some(control) = self.control.as_mut().filter(|_| fresh || changed) {
            control.changed(&self.machine.status(), &mut self.poll);
        }
    }
}

fn read_signal(signals: &OwnedFd) -> io::Result<usize> {
    let mut bytes = [0u8; 128];
    // SAFETY: the buffer has the size of a signalfd_siginfo.
    let got = unsafe { libc::read(signals.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

impl Machine {
    fn on_message(&mut self, message: Message, poll: &mut Poll) {
        match message {
            Message::Activate(index) => self.activate(index, poll),
            Message::Reset(index) => self.reset(index, poll),
            Message::Progress | Message::Serial => self.changed = true,
            Message::Exit(reason) => {
                self.exit.get_or_insert(reason);
            }
        }
    }

    fn activate(&mut self, index: usize, poll: &mut Poll) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let Some(ready) = slot.transport.take_ready() else { return };
        for (queue, fd) in ready.kicks {
            // Without the watch this queue is never served: the driver sees a device that does not answer, as with a
            // kernel that has no memory left.
            let _ = poll.add(Owner::Kick(index), fd, KICK, queue.into());
        }
        slot.active = true;
        let activation = Activation {
            memory: self.ram.memory().clone(),
            features: ready.features,
            queues: ready.queues,
            interrupt: slot.transport.clone(),
        };
        flight::note(What::device(index), "activated");
        slot.device.activate(activation, &mut DeviceWatch { poll, device: index });
    }

    fn reset(&mut self, index: usize, poll: &mut Poll) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        if std::mem::take(&mut slot.active) {
            flight::note(What::device(index), "reset");
            slot.device.deactivate(&mut DeviceWatch { poll, device: index });
        }
        for fd in slot.transport.kicks() {
            poll.remove(fd);
        }
        slot.transport.confirm_reset();
    }

    fn status(&self) -> Status {
        self.guest.with(|news| Status {
            vm: self.vm,
            phase: self.phase,
            guest_ready: news.ready,
            workload: news.workload,
            guest_problem: news.problem.clone(),
            health: news.health.clone(),
            times: self.bus.times.all(),
            landlock: crate::sandbox::landlock_version(),
        })
    }

    fn stats(&self) -> BTreeMap<String, u64> {
        let mut stats = BTreeMap::new();
        for slot in &self.slots {
            let name = &slot.name;
            stats.extend(slot.device.counters().into_iter().map(|(n, v)| (format!("{name}.{n}"), v)));
            stats.insert(format!("{name}.refused_activations"), slot.transport.failures());
        }
        stats.extend(self.console_counters.iter().map(|(n, v)| (format!("console.{n}"), *v)));
        stats
    }
}

impl Machine {
    /// Hands a request to the device of this name.
    fn ask_device(&mut self, name: &str, request: DeviceRequest, poll: &mut Poll) -> Reply {
        let found = self.slots.iter_mut().enumerate().find(|(_, slot)| slot.name == name);
        let Some((device, slot)) = found else {
            return Reply::Refused { reason: format!("the VM has no device {name:?}") };
        };
        match slot.device.on_request(request, &mut DeviceWatch { poll, device }) {
            Ok(()) => Reply::Done,
            Err(reason) => Reply::Refused { reason: format!("{name}: {reason}") },
        }
    }

    fn samples(&self) -> Samples {
        let mut samples = Samples::default();
        for slot in &self.slots {
            slot.device.samples(samples.of(&slot.name));
            samples.counters(None, &[("refused_activations", slot.transport.failures())]);
        }
        samples.of("console").counters(None, &self.console_counters);
        for (index, stats) in self.vcpus.stats().iter().enumerate() {
            stats.read(samples.of(&format!("vcpu{index}")));
        }
        samples
    }

    /// What the flight recorder has, and why devices stand still.
    fn flight_events(&self) -> Vec<FlightEvent> {
        let name = |index: u8| self.slots.get(usize::from(index)).map(|slot| slot.name.clone());
        let mut events = flight::events(&name);
        let failed = |slot: &Slot| {
            let event = slot.device.failure()?.chars().take(FAILURE_CHARS_MAX).collect();
            Some(FlightEvent { at_us: now_us(), what: slot.name.clone(), event })
        };
        events.extend(self.slots.iter().filter_map(failed));
        events
    }
}

impl Answer for Machine {
    fn answer(&mut self, request: &Request, mut given: Vec<OwnedFd>, poll: &mut Poll) -> Answered {
        flight::note_request(request);
        if matches!(request, Request::Snapshot(_) | Request::Fork)
            && let Some(slot) = self.slots.iter().find(|slot| slot.device.writes_unseen())
        {
            let reason =
                format!("{} is served by vhost-net, whose writes to memory are not tracked", slot.name);
            return (Reply::Refused { reason }, vec![]);
        }
        let reply = match request {
            Request::Status | Request::Subscribe => Reply::Status(self.status()),
            Request::Pause => {
                self.pause(poll);
                Reply::Done
            }
            Request::Resume => {
                self.resume(poll);
                Reply::Done
            }
            Request::Stop => match &self.ask_stop {
                Some(ask) => {
                    ask();
                    Reply::Done
                }
                None => Reply::Refused { reason: "the VM has no vsock device to ask its guest over".into() },
            },
            Request::Kill => {
                self.exit.get_or_insert(ExitReason::Killed);
                Reply::Done
            }
            Request::Stats => Reply::Stats(self.stats()),
            Request::Snapshot(kind) => return self.snapshot(*kind, given, poll),
            Request::Fork => return self.fork(poll),
            Request::WorkingSet => return self.working_set(given),
            Request::ResizeDisk { id } => self.ask_device(&format!("blk.{id}"), DeviceRequest::Resize, poll),
            Request::SwapDisk { id } => match given.pop() {
                Some(backing) => self.ask_device(&format!("blk.{id}"), DeviceRequest::Swap(backing), poll),
                None => Reply::Refused { reason: "no descriptor was passed beside the request".into() },
            },
            Request::SetBalloon { mib } => self.ask_device("balloon", DeviceRequest::Inflate(*mib), poll),
            Request::StartHinting => self.ask_device("balloon", DeviceRequest::StartHinting, poll),
            Request::StopHinting => self.ask_device("balloon", DeviceRequest::StopHinting, poll),
            Request::Metrics { from } => Reply::Metrics(self.samples().page(*from)),
        };
        (reply, vec![])
    }
}

#[cfg(test)]
mod tests {
    use blixard_vmm_api::health::{Health, HealthState};

    use super::*;

    #[test]
    fn a_guest_that_says_again_how_its_work_ended_is_no_news() {
        let (guest, times) = (Guest::default(), Times::default());
        let is_new = |record| {
            guest.on_record(record, &times);
            guest.with(|news| std::mem::take(&mut news.fresh))
        };
        let health = |state| LinkRecord::Health(Health { state, output: String::new() });
        assert!(is_new(LinkRecord::Started) && !is_new(LinkRecord::Started));
        assert!(is_new(LinkRecord::Ready) && !is_new(LinkRecord::Ready));
        assert!(is_new(health(HealthState::Healthy)) && !is_new(health(HealthState::Healthy)));
        assert!(is_new(health(HealthState::Unhealthy)));
        assert!(is_new(LinkRecord::WorkloadExited(WorkloadExit::Code(1))));
        assert!(!is_new(LinkRecord::WorkloadExited(WorkloadExit::Code(2))));
        assert!(is_new(LinkRecord::Problem("a".into())) && !is_new(LinkRecord::Problem("b".into())));
        assert!(!is_new(LinkRecord::Stop));
        assert_eq!(guest.outcome(), (Some(WorkloadExit::Code(1)), Some("a".into())));
    }
}
