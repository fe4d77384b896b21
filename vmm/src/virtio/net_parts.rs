//! What a network card is made of, and what cannot be one.

use std::io;

use blixard_vmm_api::config::MacAddr;
use blixard_vmm_api::rate::RateLimit;

use super::net_tap::{Tap, TapError};
use super::vhost_net::{Vhost, VhostError};

/// Most pairs of queues.
pub const PAIRS_MAX: usize = 8;
/// Smallest MTU (virtio 1.3 section 5.1.4.1).
pub const MTU_MIN: u16 = 68;

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

    /// Whether a card can be made of them.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn check(&self) -> Result<(), NetError> {
        let Self { taps, vhost, mac, mtu, receive_limit, send_limit } = self;
        let pairs = taps.len();
        if !mac.is_unicast() {
            return Err(NetError::Mac(*mac));
        }
        if *mtu < MTU_MIN {
            return Err(NetError::Mtu(*mtu));
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
        let limited = *receive_limit != RateLimit::default() || *send_limit != RateLimit::default();
        if !vhost.is_empty() && limited {
            return Err(NetError::VhostLimit);
        }
        Ok(())
    }
}
