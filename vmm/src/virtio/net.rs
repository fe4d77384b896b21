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
//! first one at the beginning. With a descriptor of vhost-net per pair the kernel serves the pairs instead of us.

use std::io;
use std::sync::Arc;

use blixard_vmm_api::config::MacAddr;
use blixard_vmm_api::rate::RateLimit;
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, ConfigSpace, Device, DeviceKind, GuestMemory, Interrupt, Watch};
use super::failure::Failure;
use super::net_control::{self, Command};
use super::net_pair::{Due, Limits, Pair};
use super::net_queues::{Host, NetFailure, Stop};
use super::net_tap::{Tap, TapError, offload};
use super::queue::Queue;
use super::rate::Limiter;
use super::turn::Turn;
use super::vhost_net::{Ring, Vhost, VhostError};
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::stats::Samples;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
const COMMANDS_PER_TURN: usize = 16;
const TURN: u64 = 0;
const RECEIVE_LIMIT: u64 = 1;
const SEND_LIMIT: u64 = 2;
const TAP_FIRST: u64 = 16;
const KERNEL_FIRST: u64 = 64;

/// Most pairs of queues.
pub const PAIRS_MAX: usize = 8;
/// Smallest MTU (virtio 1.3 section 5.1.4.1).
pub const MTU_MIN: u16 = 68;

/// Bits of virtio 1.3 section 5.1.3.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub const MQ: u64 = 1 << 22;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
    /// What the driver can switch while it runs.
    pub const GUEST_OFFLOADS: u64 =
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
}

const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

/// Why there can be no network card.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The descriptor is no tap that we can use.
    #[error("the tap is unusable")]
    Tap(#[from] TapError),
    /// A group address.
    #[error("{0} is not the hardware address of one card")]
    Mac(MacAddr),
    /// Below [`MTU_MIN`].
    #[error("an MTU of {0} bytes is below {MTU_MIN}")]
    Mtu(u16),
    /// None, or more than [`PAIRS_MAX`].
    #[error("{0} queues of the tap, 1 to {PAIRS_MAX} are possible")]
    Pairs(usize),
    /// Several queues of a tap that can have one only.
    #[error("the tap was made without IFF_MULTI_QUEUE")]
    OneQueue,
    /// Not as many as there are pairs of queues.
    #[error("{0} descriptors of vhost-net, one per queue of the tap is needed")]
    VhostCount(usize),
    /// The kernel serves the queues, so that nobody counts.
    #[error("a card served by vhost-net cannot be limited")]
    VhostLimit,
    /// A descriptor is no vhost-net device.
    #[error("vhost-net")]
    Vhost(#[from] VhostError),
    /// The events of the device cannot be made.
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// What a card is made of.
pub struct Parts {
    /// The queues of its tap, one per pair of queues.
    pub taps: Vec<Tap>,
    /// None, or one per pair of queues.
    pub vhost: Vec<Vhost>,
    /// Hardware address, unicast.
    pub mac: MacAddr,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// Limit on frames to the guest.
    pub receive_limit: RateLimit,
    /// Limit on frames from the guest.
    pub send_limit: RateLimit,
}

impl Parts {
    /// A card on one queue, without limits.
    pub fn new(tap: Tap, mac: MacAddr, mtu: u16) -> Self {
        let (receive_limit, send_limit) = (RateLimit::default(), RateLimit::default());
        Self { taps: vec![tap], vhost: vec![], mac, mtu, receive_limit, send_limit }
    }
}

/// The device.
pub struct Net {
    mac: MacAddr,
    mtu: u16,
    queue_sizes: Vec<u16>,
    config: ConfigSpace,
    /// The interface is there.
    link: bool,
    /// The driver shall tell its neighbours where it is.
    announce: bool,
    hosts: Vec<Host>,
    vhost: Vec<Vhost>,
    limits: Limits,
    turn: Turn,
    active: Option<Active>,
    paused: bool,
    failure: Failure,
    kernel_refusals: u64,
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

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    pairs: Vec<Pair>,
    control: Queue,
    control_waits: bool,
    /// Pairs that the driver uses.
    in_use: usize,
    /// Offload features that it uses.
    offloads: u64,
    /// The kernel serves the pairs, and nobody else.
    kernel: bool,
}

impl Net {
    /// A card.
    ///
    /// # Errors
    /// What is wrong with its parts.
    pub fn new(parts: Parts) -> Result<Self, NetError> {
        let Parts { taps, vhost, mac, mtu, receive_limit, send_limit } = parts;
        let pairs = taps.len();
        if !mac.is_unicast() {
            return Err(NetError::Mac(mac));
        }
        if mtu < MTU_MIN {
            return Err(NetError::Mtu(mtu));
        }
        if !(1..=PAIRS_MAX).contains(&pairs) {
            return Err(NetError::Pairs(pairs));
        }
        if pairs > 1 && !taps.iter().all(Tap::is_multi_queue) {
            return Err(NetError::OneQueue);
        }
        if !vhost.is_empty() && vhost.len() != pairs {
            return Err(NetError::VhostCount(vhost.len()));
        }
        let limited = receive_limit != RateLimit::default() || send_limit != RateLimit::default();
        if !vhost.is_empty() && limited {
            return Err(NetError::VhostLimit);
        }
        let limiter = |limit| Limiter::new(limit).map_err(NetError::Event);
        let limits = Limits { receive: limiter(&receive_limit)?, send: limiter(&send_limit)? };
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
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
    fn show_config(&mut self) {
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
    fn run(&mut self, watch: &mut dyn Watch, mut due: impl FnMut(usize, &mut Pair, &mut Host) -> Due) {
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
    fn end(&mut self, result: Result<(), NetFailure>, watch: &mut dyn Watch) {
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

    // The kernel's part.

    /// Hands the pairs over to the kernel; false when it does not take them and we have to serve them.
    fn enter_kernel(&mut self, active: &Active, watch: &mut dyn Watch) -> bool {
        if self.vhost.is_empty() {
            return false;
        }
        for (number, vhost) in self.vhost.iter_mut().enumerate() {
            let (Some(pair), Some(host)) = (active.pairs.get(number), self.hosts.get(number)) else { break };
            if let Err(error) = hand_over(vhost, pair, host, active) {
                self.kernel_refusals += 1;
                drop(error);
                for vhost in &mut self.vhost {
                    vhost.pause();
                }
                return false;
            }
        }
        for (number, vhost) in (0u64..).zip(&self.vhost) {
            // Without the watch a broken ring is silent, as a driver deserves that breaks it.
            let _ = watch.add(vhost.error_fd(), EventSet::IN.bits(), KERNEL_FIRST + number);
        }
        for pair in &active.pairs {
            for queue in [&pair.to_guest.queue, &pair.from_guest.queue] {
                if let Some(fd) = active.interrupt.kick_fd(queue.index()) {
                    watch.remove(fd);
                }
            }
        }
        true
    }

    fn leave_kernel(&mut self, watch: &mut dyn Watch) {
        if !self.active.as_mut().is_some_and(|active| std::mem::take(&mut active.kernel)) {
            return;
        }
        for vhost in &mut self.vhost {
            watch.remove(vhost.error_fd());
            // Where it stopped matters to nobody: the driver resets the device.
            let _place = vhost.stop();
        }
    }

    fn pause_kernel(&mut self, watch: &mut dyn Watch) {
        let mut result = Ok(());
        for (vhost, host) in self.vhost.iter_mut().zip(&self.hosts) {
            if self.paused {
                vhost.pause();
            } else if vhost.resume(host.tap.raw_fd()).is_err() {
                result = Err(NetFailure::Kernel);
            }
        }
        self.end(result, watch);
    }

    /// Brings the tap and the events into the state that a fresh driver expects: one queue in use.
    fn prepare(&mut self, offered: u64, watch: &mut dyn Watch) -> Result<(), NetFailure> {
        for (number, host) in self.hosts.iter_mut().enumerate() {
            host.tap.attach(number == 0).map_err(NetFailure::Attach)?;
        }
        let first = self.hosts.first();
        first.map_or(Ok(()), |host| host.tap.set_offload(offloads(offered))).map_err(NetFailure::Offload)?;
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

    // The control queue.

    fn run_control(&mut self, watch: &mut dyn Watch) {
        if self.paused || self.active.is_none() {
            return;
        }
        let result = self.commands(watch);
        self.end(result, watch);
    }

    fn commands(&mut self, watch: &mut dyn Watch) -> Result<(), NetFailure> {
        for _ in 0..COMMANDS_PER_TURN {
            let Some(active) = self.active.as_mut() else { return Ok(()) };
            let Some(chain) = active.control.pop()? else {
                if active.control.enable_kicks()? {
                    continue;
                }
                return self.publish_control();
            };
            let memory = Arc::clone(&active.memory);
            let done = Command::read(&chain, &memory).is_some_and(|command| self.obey(command, watch));
            let filled = net_control::answer(&chain, &memory, done)?;
            if let Some(active) = self.active.as_mut() {
                active.control.add_used(chain, filled)?;
            }
        }
        if let Some(active) = self.active.as_mut() {
            active.control_waits = true;
            self.turn.ask();
        }
        self.publish_control()
    }

    fn publish_control(&mut self) -> Result<(), NetFailure> {
        if let Some(active) = self.active.as_mut()
            && active.control.publish()?
        {
            active.interrupt.used(active.control.index());
        }
        Ok(())
    }

    /// Does what the driver asks for; false when that is not possible.
    fn obey(&mut self, command: Command, watch: &mut dyn Watch) -> bool {
        let Some(active) = self.active.as_mut() else { return false };
        let agreed = |feature| active.features & feature != 0;
        match command {
            Command::AnnounceAck if agreed(feature::GUEST_ANNOUNCE) => {
                self.announce = false;
                self.show_config();
                true
            }
            Command::Pairs(count) if agreed(feature::MQ) => {
                (1..=active.pairs.len()).contains(&usize::from(count)) && self.use_pairs(count.into(), watch)
            }
            Command::Offloads(bits) if agreed(feature::CTRL_GUEST_OFFLOADS) => {
                let possible = bits & !(active.features & feature::GUEST_OFFLOADS) == 0
                    && self.hosts.first().is_some_and(|host| host.tap.set_offload(offloads(bits)).is_ok());
                if possible {
                    active.offloads = bits;
                }
                possible
            }
            _ => false,
        }
    }

    /// Lets the tap spread frames over the first `count` pairs. When it refuses, those stay in use that it took.
    fn use_pairs(&mut self, count: usize, watch: &mut dyn Watch) -> bool {
        let Some(active) = self.active.as_mut() else { return false };
        let mut possible = true;
        active.in_use = 0;
        for (number, (pair, host)) in active.pairs.iter_mut().zip(&mut self.hosts).enumerate() {
            let wanted = number < count && possible;
            if !wanted {
                pair.unwatch(host, watch);
            }
            possible &= host.tap.attach(wanted).is_ok();
            if wanted && possible {
                active.in_use = number + 1;
            }
        }
        // The first one is never detached, so it is there in any case.
        active.in_use = active.in_use.max(1);
        self.run(watch, |_, _, _| Due::BOTH);
        possible
    }
}

fn hand_over(vhost: &mut Vhost, pair: &Pair, host: &Host, active: &Active) -> Result<(), VhostError> {
    let ring = |queue| ring(queue, &*active.interrupt).ok_or(VhostError::Events(Queue::index(queue)));
    let rings = [ring(&pair.to_guest.queue)?, ring(&pair.from_guest.queue)?];
    vhost.start(&rings, active.features, &active.memory, host.tap.raw_fd())
}

fn ring<'a>(queue: &'a Queue, interrupt: &dyn Interrupt) -> Option<Ring<'a>> {
    let index = queue.is_enabled().then_some(queue.index())?;
    Some(Ring { queue, kick: interrupt.kick_fd(index)?, call: interrupt.call_fd(index)? })
}

/// What frames to the guest may leave undone, as the tap is told.
fn offloads(features: u64) -> u32 {
    if features & feature::GUEST_CSUM == 0 {
        // Segmentation needs checksums (virtio 1.3 section 5.1.3.1).
        return 0;
    }
    let mut bits = offload::CSUM;
    let tso = features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0;
    for (feature, bit) in [
        (feature::GUEST_TSO4, offload::TSO4),
        (feature::GUEST_TSO6, offload::TSO6),
        // The kernel refuses it alone.
        (if tso { feature::GUEST_ECN } else { 0 }, offload::TSO_ECN),
    ] {
        if features & feature != 0 {
            bits |= bit;
        }
    }
    // The kernel has one switch for both.
    let uso = feature::GUEST_USO4 | feature::GUEST_USO6;
    if features & uso == uso {
        bits |= offload::USO4 | offload::USO6;
    }
    bits
}

impl Device for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let checksums = feature::CSUM | feature::GUEST_CSUM;
        let to_host = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;
        let to_guest = feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN | feature::MRG_RXBUF;
        let control = feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS | feature::GUEST_ANNOUNCE;
        let always = feature::MAC | feature::MTU | feature::STATUS;
        let mut features = checksums | to_host | to_guest | control | always;
        if self.hosts.iter().all(|host| host.tap.has_uso()) {
            features |= feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6;
        }
        if self.hosts.len() > 1 {
            features |= feature::MQ;
        }
        features
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
