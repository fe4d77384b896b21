//! Network card (virtio 1.3 section 5.1): frames between two queues and a tap, copied by the kernel straight from and to
//! guest memory.
//!
//! Both directions are derived from what is there each time anything happens, never from remembered edges:
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

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use blixard_vmm_api::config::MacAddr;
use vmm_sys_util::epoll::EventSet;

use super::device::{Activation, ConfigSpace, Device, DeviceKind, Interrupt, Watch};
use super::failure::Failure;
use super::net_queues::{FromGuest, Host, NetFailure, Stop, ToGuest};
use super::net_tap::{Tap, TapError, offload};
use super::queue::Queue;
use super::turn::Turn;

const QUEUE_SIZES: [u16; 2] = [256, 256];
const TURN: u64 = 0;
const TAP: u64 = 1;

/// Smallest MTU (virtio 1.3 section 5.1.4.1).
pub const MTU_MIN: u16 = 68;

/// Bits of virtio 1.3 section 5.1.3.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

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
    /// The events of the device cannot be made.
    #[error("events of the device")]
    Event(#[source] io::Error),
}

/// The device.
pub struct Net {
    mac: MacAddr,
    mtu: u16,
    config: ConfigSpace,
    /// What the configuration says of the link.
    link: bool,
    host: Host,
    turn: Turn,
    active: Option<Active>,
    paused: bool,
    failure: Failure,
}

struct Active {
    interrupt: Arc<dyn Interrupt>,
    to_guest: ToGuest,
    from_guest: FromGuest,
    /// What of the tap is watched.
    watched: u32,
}

impl Net {
    /// A card with this hardware address on a queue of a tap made with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// # Errors
    /// What is wrong with the tap, the address or the MTU.
    pub fn new(tap: OwnedFd, mac: MacAddr, mtu: u16) -> Result<Self, NetError> {
        Self::on(Tap::new(tap)?, mac, mtu)
    }

    /// A card on an opened tap.
    ///
    /// # Errors
    /// What is wrong with the address or the MTU.
    pub fn on(tap: Tap, mac: MacAddr, mtu: u16) -> Result<Self, NetError> {
        if !mac.is_unicast() {
            return Err(NetError::Mac(mac));
        }
        if mtu < MTU_MIN {
            return Err(NetError::Mtu(mtu));
        }
        Ok(Self {
            mac,
            mtu,
            config: ConfigSpace::new(config_bytes(mac, true, mtu)),
            link: true,
            host: Host::new(tap),
            turn: Turn::new().map_err(NetError::Event)?,
            active: None,
            paused: false,
            failure: Failure::default(),
        })
    }

    fn run(&mut self, watch: &mut dyn Watch) {
        let Some(active) = self.active.as_mut().filter(|_| !self.paused) else { return };
        match active.serve(&mut self.host, watch) {
            Ok(true) => self.turn.ask(),
            Ok(false) => {}
            Err(error) => {
                self.failure.note(&error, &*active.interrupt);
                active.to_guest.stop();
                active.from_guest.stop();
                active.watch_tap(&self.host, 0, watch);
            }
        }
        if self.host.gone && self.link {
            self.link = false;
            self.config.set(config_bytes(self.mac, false, self.mtu));
            active.interrupt.config_changed();
        }
    }
}

impl Active {
    /// A turn in both directions; true when there is more to do.
    fn serve(&mut self, host: &mut Host, watch: &mut dyn Watch) -> Result<bool, NetFailure> {
        let received = self.to_guest.run(host);
        let sent = self.from_guest.run(host);
        for queue in [&mut self.to_guest.queue, &mut self.from_guest.queue] {
            if queue.publish()? {
                self.interrupt.used(queue.index());
            }
        }
        let (received, sent) = (received?, sent?);
        let mut wanted = EventSet::empty();
        if received == Stop::Tap {
            wanted |= EventSet::IN;
        }
        if sent == Stop::Tap {
            wanted |= EventSet::OUT;
        }
        self.watch_tap(host, wanted.bits(), watch);
        Ok(received == Stop::Turn || sent == Stop::Turn)
    }

    fn watch_tap(&mut self, host: &Host, wanted: u32, watch: &mut dyn Watch) {
        // Errors and hang-ups are reported in any case: a tap that is gone would wake us for ever.
        let wanted = if host.gone { 0 } else { wanted };
        let fd = host.tap.raw_fd();
        let result = match (self.watched, wanted) {
            (before, after) if before == after => return,
            (0, _) => watch.add(fd, wanted, TAP),
            (_, 0) => {
                watch.remove(fd);
                Ok(())
            }
            _ => watch.modify(fd, wanted, TAP),
        };
        if result.is_ok() {
            self.watched = wanted;
        }
    }
}

/// `struct virtio_net_config` (virtio 1.3 section 5.1.4).
fn config_bytes(mac: MacAddr, link: bool, mtu: u16) -> Vec<u8> {
    let mut bytes = mac.0.to_vec();
    bytes.extend(u16::from(link).to_le_bytes());
    bytes.extend(1u16.to_le_bytes()); // max_virtqueue_pairs
    bytes.extend(mtu.to_le_bytes());
    bytes
}

/// What frames to the guest may leave undone, as the tap is told.
fn offloads(features: u64) -> u32 {
    if features & feature::GUEST_CSUM == 0 {
        // Segmentation needs checksums (virtio 1.3 section 5.1.3.1).
        return 0;
    }
    let mut bits = offload::CSUM;
    if features & feature::GUEST_TSO4 != 0 {
        bits |= offload::TSO4;
    }
    if features & feature::GUEST_TSO6 != 0 {
        bits |= offload::TSO6;
    }
    bits
}

impl Device for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let checksums = feature::CSUM | feature::GUEST_CSUM;
        let to_host = feature::HOST_TSO4 | feature::HOST_TSO6;
        let to_guest = feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::MRG_RXBUF;
        checksums | to_host | to_guest | feature::MAC | feature::MTU | feature::STATUS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> ConfigSpace {
        self.config.clone()
    }

    fn activate(&mut self, activation: Activation, watch: &mut dyn Watch) {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut queues = queues.into_iter();
        let mut next = |index| queues.next().unwrap_or_else(|| Queue::disabled(index));
        let (receiving, sending) = (next(0), next(1));
        let prepared = self.host.tap.set_offload(offloads(features)).map_err(NetFailure::Offload);
        if let Err(error) = prepared.and_then(|()| self.turn.watch(watch, TURN).map_err(NetFailure::Event)) {
            self.failure.note(&error, &*interrupt);
            return;
        }
        let memory = Arc::new(memory);
        let to_guest = ToGuest::new(&memory, receiving, features & feature::MRG_RXBUF != 0);
        let from_guest = FromGuest::new(&memory, sending);
        self.active = Some(Active { interrupt, to_guest, from_guest, watched: 0 });
        self.run(watch);
    }

    fn on_kick(&mut self, _index: u16, watch: &mut dyn Watch) {
        self.run(watch);
    }

    fn on_event(&mut self, token: u64, events: u32, watch: &mut dyn Watch) {
        if token == TURN {
            self.turn.take();
        } else if events & (EventSet::ERROR | EventSet::HANG_UP).bits() != 0 {
            // The interface was removed.
            self.host.gone = true;
        }
        self.run(watch);
    }

    fn deactivate(&mut self, watch: &mut dyn Watch) {
        if let Some(mut active) = self.active.take() {
            active.watch_tap(&self.host, 0, watch);
            self.turn.unwatch(watch);
        }
        self.failure.clear();
    }

    fn on_pause(&mut self, paused: bool, watch: &mut dyn Watch) {
        self.paused = paused;
        if paused {
            // Level-triggered events of the tap would come again and again.
            if let Some(active) = self.active.as_mut() {
                active.watch_tap(&self.host, 0, watch);
            }
        }
        self.run(watch);
    }

    fn failure(&self) -> Option<String> {
        self.failure.reason()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.host.counts;
        vec![
            ("received_frames", c.received),
            ("received_bytes", c.received_bytes),
            ("received_dropped", c.received_dropped),
            ("received_copied", c.received_copied),
            ("sent_frames", c.sent),
            ("sent_bytes", c.sent_bytes),
            ("sent_dropped", c.sent_dropped),
            ("failures", self.failure.count()),
        ]
    }
}
