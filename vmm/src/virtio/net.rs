//! Network card (virtio 1.3 section 5.1): frames between two queues and a tap, copied by the kernel straight from and to
//! guest memory.
//!
//! A direction runs until it is out of something and then again when that has come:
//!
//! ```text
//!   receive: take frames while there are buffers and frames.  Out of frames ─► watch the tap for input
//!                                                             Out of buffers ─► ask the driver for a kick, look once more
//!   send:    send frames while there are frames and room.     Out of frames ─► ask the driver for a kick, look once more
//!                                                             Out of room ─► keep the frame, watch the tap for output
//! ```
//!
//! So a full queue together with a full tap cannot leave both sides waiting for each other: whoever gets room next is
//! watched.
//!
//! A card has as many pairs of queues as its tap has queues; the driver says over the control queue how many it uses, the
//! first one at the beginning (`net_control.rs`). With a descriptor of vhost-net per pair the kernel serves the pairs
//! instead of us (`net_kernel.rs`).

use std::sync::Arc;

use blixard_vmm_api::config::MacAddr;
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, ConfigSpace, Device, DeviceKind, GuestMemory, Interrupt, Watch};
use super::failure::Failure;
use super::net_features as feature;
use super::net_pair::{Due, Limits, Pair};
pub use super::net_parts::{MTU_MIN, NetError, PAIRS_MAX, Parts};
use super::net_queues::{Host, NetFailure, Stop};
use super::queue::Queue;
use super::rate::Limiter;
use super::turn::Turn;
use super::vhost_net::Vhost;
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::stats::Samples;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
const TURN: u64 = 0;
const RECEIVE_LIMIT: u64 = 1;
const SEND_LIMIT: u64 = 2;
const TAP_FIRST: u64 = 16;
pub(super) const KERNEL_FIRST: u64 = 64;

const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

/// The device.
pub struct Net {
    mac: MacAddr,
    mtu: u16,
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
    /// The interface is there.
    link: bool,
    /// The driver shall tell its neighbours where it is.
    pub(super) announce: bool,
    pub(super) hosts: Vec<Host>,
    pub(super) vhost: Vec<Vhost>,
    limits: Limits,
    pub(super) turn: Turn,
    pub(super) active: Option<Active>,
    pub(super) paused: bool,
    failure: Failure,
    pub(super) kernel_refusals: u64,
    /// How the driver left a card of a snapshot that this one continues.
    restored: Option<Switches>,
}

/// What a driver switches over the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Switches {
    /// Pairs in use, at least 1.
    pairs: u16,
    /// Offload features in use.
    offloads: u64,
}

/// The driver's side.
pub(super) struct Active {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) features: u64,
    pub(super) pairs: Vec<Pair>,
    pub(super) control: Queue,
    pub(super) control_waits: bool,
    /// Pairs that the driver uses.
    pub(super) in_use: usize,
    /// Offload features that it uses.
    pub(super) offloads: u64,
    /// The kernel serves the pairs, and nobody else.
    pub(super) kernel: bool,
}

impl Net {
    /// A card.
    ///
    /// # Errors
    /// What is wrong with its parts.
    pub fn new(parts: Parts) -> Result<Self, NetError> {
        parts.check()?;
        let Parts { taps, vhost, mac, mtu, receive_limit, send_limit } = parts;
        let limiter = |limit| Limiter::new(limit).map_err(NetError::Event);
        let limits = Limits { receive: limiter(&receive_limit)?, send: limiter(&send_limit)? };
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * taps.len()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        let mut net = Self {
            mac,
            mtu,
            queue_sizes,
            config: ConfigSpace::default(),
            link: true,
            announce: false,
            hosts: taps.into_iter().map(Host::new).collect(),
            vhost,
            limits,
            turn: Turn::new().map_err(NetError::Event)?,
            active: None,
            paused: false,
            failure: Failure::default(),
            kernel_refusals: 0,
            restored: None,
        };
        net.show_config();
        Ok(net)
    }

    /// `struct virtio_net_config` (virtio 1.3 section 5.1.4).
    pub(super) fn show_config(&mut self) {
        let mut status = 0;
        if self.link {
            status |= STATUS_LINK_UP;
        }
        if self.announce {
            status |= STATUS_ANNOUNCE;
        }
        let mut bytes = self.mac.0.to_vec();
        bytes.extend(u16::to_le_bytes(status));
        // max_virtqueue_pairs
        bytes.extend(u16::try_from(self.hosts.len()).unwrap_or(1).to_le_bytes());
        bytes.extend(self.mtu.to_le_bytes());
        self.config.set(bytes);
    }

    /// Asks the driver to tell its neighbours where it is, as after a move to another host (virtio 1.3 section 5.1.6.5.4).
    pub fn announce(&mut self) {
        if let Some(active) = self.active.as_ref().filter(|a| a.features & feature::GUEST_ANNOUNCE != 0) {
            let interrupt = Arc::clone(&active.interrupt);
            self.announce = true;
            self.show_config();
            interrupt.config_changed();
        }
    }

    /// Whether the kernel serves the queues now.
    pub fn is_kernel_served(&self) -> bool {
        self.active.as_ref().is_some_and(|active| active.kernel)
    }

    /// Gives the pairs in use that have a reason a turn.
    pub(super) fn run(
        &mut self,
        watch: &mut dyn Watch,
        mut due: impl FnMut(usize, &mut Pair, &mut Host) -> Due,
    ) {
        let Some(active) = self.active.as_mut().filter(|a| !a.kernel && !self.paused) else { return };
        let mut more = false;
        let mut result = Ok(());
        for (number, (pair, host)) in
            active.pairs.iter_mut().zip(&mut self.hosts).take(active.in_use).enumerate()
        {
            let due = due(number, pair, host);
            match pair.serve(due, host, &mut self.limits, &*active.interrupt, watch) {
                Ok(rest) => more |= rest,
                Err(error) => result = Err(error),
            }
        }
        if more {
            self.turn.ask();
        }
        self.end(result, watch);
    }

    /// What follows a turn: a failure stops the device, an interface that went away takes the link down.
    pub(super) fn end(&mut self, result: Result<(), NetFailure>, watch: &mut dyn Watch) {
        let Some(active) = self.active.as_mut() else { return };
        let interrupt = Arc::clone(&active.interrupt);
        if let Err(error) = result {
            for (pair, host) in active.pairs.iter_mut().zip(&self.hosts) {
                pair.stop(host, watch);
            }
            active.control = Queue::disabled(0);
            self.failure.note(&error, &*interrupt);
            self.leave_kernel(watch);
        }
        if self.link && self.hosts.iter().any(|host| host.gone) {
            self.link = false;
            self.show_config();
            interrupt.config_changed();
        }
    }

    /// Brings the tap and the events into the state that a fresh driver expects: one queue in use.
    fn prepare(&mut self, offered: u64, watch: &mut dyn Watch) -> Result<(), NetFailure> {
        for (number, host) in self.hosts.iter_mut().enumerate() {
            host.tap.attach(number == 0).map_err(NetFailure::Attach)?;
        }
        let first = self.hosts.first();
        first
            .map_or(Ok(()), |host| host.tap.set_offload(feature::offloads(offered)))
            .map_err(NetFailure::Offload)?;
        self.turn.watch(watch, TURN).map_err(NetFailure::Event)?;
        for (limit, token) in [(&self.limits.receive, RECEIVE_LIMIT), (&self.limits.send, SEND_LIMIT)] {
            if let Some(limit) = limit {
                limit.watch(watch, token).map_err(NetFailure::Event)?;
            }
        }
        Ok(())
    }

    fn on_tap(&mut self, number: usize, events: u32, watch: &mut dyn Watch) {
        let over = events & (EventSet::ERROR | EventSet::HANG_UP).bits() != 0;
        if let Some(active) = self.active.as_mut()
            && let (Some(pair), Some(host)) = (active.pairs.get_mut(number), self.hosts.get_mut(number))
        {
            // The interface was removed.
            host.gone |= over;
            let due = if over { Due::BOTH } else { pair.on_tap(events, host, watch) };
            self.run(watch, |each, _, _| if each == number { due } else { Due::default() });
        }
    }
}

impl Device for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let uso = self.hosts.iter().all(|host| host.tap.has_uso());
        feature::offered(uso, self.hosts.len() > 1)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch) {
        let Activation { memory, features, queues, interrupt } = activation;
        let several = features & feature::MQ != 0;
        let pairs = if several { self.hosts.len() } else { 1 };
        let mut queues = queues.into_iter();
        let mut next = |index| queues.next().unwrap_or_else(|| Queue::disabled(index));
        let memory = Arc::new(memory);
        let mergeable = features & feature::MRG_RXBUF != 0;
        let pair = |number: u16| {
            let (receiving, sending) = (next(2 * number), next(2 * number + 1));
            Pair::new(&memory, (receiving, sending), mergeable, TAP_FIRST + u64::from(number))
        };
        let pairs: Vec<Pair> = (0u16..).take(pairs).map(pair).collect();
        // Without MQ it follows the first pair, however many there could be (virtio 1.3 section 5.1.2).
        let control = if features & feature::CTRL_VQ != 0 { next(0) } else { Queue::disabled(0) };
        let mut active = Active {
            memory: Arc::clone(&memory),
            interrupt,
            features,
            pairs,
            control,
            control_waits: false,
            in_use: 1,
            offloads: features & feature::GUEST_OFFLOADS,
            kernel: false,
        };
        let restored = self.restored.take();
        if let Some(switches) = restored {
            active.offloads &= switches.offloads;
        }
        if let Err(error) = self.prepare(active.offloads, watch) {
            self.failure.note(&error, &*active.interrupt);
            return;
        }
        active.kernel = self.enter_kernel(&active, watch);
        self.active = Some(active);
        self.on_pause(self.paused, watch);
        if let Some(switches) = restored {
            // As far as this tap has as many queues; the others are as if no frame arrived there.
            self.use_pairs(switches.pairs.into(), watch);
            self.announce();
        }
    }

    fn on_kick(&mut self, index: u16, watch: &mut dyn Watch) {
        let Some(active) = self.active.as_ref() else { return };
        if active.control.is_enabled() && index == active.control.index() {
            return self.run_control(watch);
        }
        let (kicked, sending) = (usize::from(index / 2), index % 2 == 1);
        self.run(
            watch,
            |number, pair, _| {
                if number == kicked { pair.on_kick(sending) } else { Due::default() }
            },
        );
    }

    fn on_event(&mut self, token: u64, events: u32, watch: &mut dyn Watch) {
        match token {
            TURN => {
                self.turn.take();
                if self.active.as_mut().is_some_and(|active| std::mem::take(&mut active.control_waits)) {
                    self.run_control(watch);
                }
                self.run(watch, |_, pair, _| pair.after(Stop::Turn));
            }
            RECEIVE_LIMIT | SEND_LIMIT => {
                let receive = token == RECEIVE_LIMIT;
                let limit = if receive { &mut self.limits.receive } else { &mut self.limits.send };
                if let Some(limit) = limit {
                    limit.take_timer();
                }
                self.run(watch, |_, pair, _| {
                    let due = pair.after(Stop::Limit);
                    Due { receive: due.receive && receive, send: due.send && !receive }
                });
            }
            KERNEL_FIRST.. => {
                let number = usize::try_from(token - KERNEL_FIRST).unwrap_or(0);
                if let Some(vhost) = self.vhost.get(number) {
                    vhost.take_error();
                    self.end(Err(NetFailure::Kernel), watch);
                }
            }
            _ => self.on_tap(usize::try_from(token - TAP_FIRST.min(token)).unwrap_or(0), events, watch),
        }
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        self.leave_kernel(watch);
        if let Some(mut active) = self.active.take() {
            for (pair, host) in active.pairs.iter_mut().zip(&self.hosts) {
                pair.unwatch(host, watch);
            }
            self.turn.unwatch(watch);
            for limit in [&mut self.limits.receive, &mut self.limits.send].into_iter().flatten() {
                limit.unwatch(watch);
            }
            if std::mem::take(&mut self.announce) {
                self.show_config();
            }
        }
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, watch: &mut dyn Watch) {
        self.paused = paused;
        let Some(active) = self.active.as_mut() else { return };
        if active.kernel {
            self.pause_kernel(watch);
        } else if paused {
            // Level-triggered events of the tap would come again and again.
            for (pair, host) in active.pairs.iter_mut().zip(&self.hosts) {
                pair.unwatch(host, watch);
            }
        }
        self.run_control(watch);
        self.run(watch, |_, _, _| Due::BOTH);
    }

    fn save(&self, to: &mut Writer) {
        let active = self.active.as_ref();
        to.u16(active.map_or(1, |active| u16::try_from(active.in_use).unwrap_or(1)));
        to.u64(active.map_or(0, |active| active.offloads));
    }

    fn restore(&mut self, from: &mut Reader<'_>) -> Result<(), Invalid> {
        let pairs = from.u16("pairs of queues in use")?;
        let offloads = from.u64("offloads in use")?;
        if !(1..=self.hosts.len()).contains(&usize::from(pairs)) {
            return Err(Invalid::Value { what: "pairs of queues in use", value: pairs.into() });
        }
        if offloads & !feature::GUEST_OFFLOADS != 0 {
            return Err(Invalid::Value { what: "offloads in use", value: offloads });
        }
        self.restored = Some(Switches { pairs, offloads });
        Ok(())
    }

    fn writes_unseen(&self) -> bool {
        self.is_kernel_served()
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum = |count: fn(&Host) -> u64| self.hosts.iter().map(count).sum();
        vec![
            ("received_frames", sum(|h| h.counts.received)),
            ("received_bytes", sum(|h| h.counts.received_bytes)),
            ("received_dropped", sum(|h| h.counts.received_dropped)),
            ("received_copied", sum(|h| h.counts.received_copied)),
            ("sent_frames", sum(|h| h.counts.sent)),
            ("sent_bytes", sum(|h| h.counts.sent_bytes)),
            ("sent_dropped", sum(|h| h.counts.sent_dropped)),
            ("failures", self.failure.count()),
            ("kernel_served", self.is_kernel_served().into()),
            ("kernel_refusals", self.kernel_refusals),
            ("receive_waits", self.limits.receive.as_ref().map_or(0, Limiter::waits)),
            ("send_waits", self.limits.send.as_ref().map_or(0, Limiter::waits)),
        ]
    }

    fn samples(&self, samples: &mut Samples) {
        samples.counters(None, &self.counters());
        for (queue, host) in (0u16..).zip(&self.hosts) {
            let c = &host.counts;
            let queue = Some(queue);
            if self.hosts.len() > 1 {
                let both = [("received_frames", c.received), ("sent_frames", c.sent)];
                samples.counters(queue, &both);
            }
            samples.counters(queue, &[("interrupts", c.interrupts), ("turns", c.turns)]);
            samples.histogram(queue, "received_frames_per_turn", &c.batches);
        }
    }
}
