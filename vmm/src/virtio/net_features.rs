//! Feature bits of a network card (virtio 1.3 section 5.1.3), and what they mean for its tap.

use super::net_tap::offload;

pub(super) const CSUM: u64 = 1 << 0;
pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(super) const MTU: u64 = 1 << 3;
pub(super) const MAC: u64 = 1 << 5;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
pub(super) const GUEST_TSO6: u64 = 1 << 8;
pub(super) const GUEST_ECN: u64 = 1 << 9;
pub(super) const HOST_TSO4: u64 = 1 << 11;
pub(super) const HOST_TSO6: u64 = 1 << 12;
pub(super) const HOST_ECN: u64 = 1 << 13;
pub(super) const MRG_RXBUF: u64 = 1 << 15;
pub(super) const STATUS: u64 = 1 << 16;
pub(super) const CTRL_VQ: u64 = 1 << 17;
pub(super) const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(super) const MQ: u64 = 1 << 22;
pub(super) const GUEST_USO4: u64 = 1 << 54;
pub(super) const GUEST_USO6: u64 = 1 << 55;
pub(super) const HOST_USO: u64 = 1 << 56;
/// What the driver can switch while it runs.
pub(super) const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

/// What a card offers: USO when its tap `has_uso`, several pairs of queues when it has `several`.
pub(super) fn offered(has_uso: bool, several: bool) -> u64 {
    let checksums = CSUM | GUEST_CSUM;
    let to_host = HOST_TSO4 | HOST_TSO6 | HOST_ECN;
    let to_guest = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | MRG_RXBUF;
    let control = CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_ANNOUNCE;
    let always = MAC | MTU | STATUS;
    let mut features = checksums | to_host | to_guest | control | always;
    if has_uso {
        features |= HOST_USO | GUEST_USO4 | GUEST_USO6;
    }
    if several {
        features |= MQ;
    }
    features
}

/// What frames to the guest may leave undone, as the tap is told.
pub(super) fn offloads(features: u64) -> u32 {
    if features & GUEST_CSUM == 0 {
        // Segmentation needs checksums (virtio 1.3 section 5.1.3.1).
        return 0;
    }
    let mut bits = offload::CSUM;
    let tso = features & (GUEST_TSO4 | GUEST_TSO6) != 0;
    for (feature, bit) in [
        (GUEST_TSO4, offload::TSO4),
        (GUEST_TSO6, offload::TSO6),
        // The kernel refuses it alone.
        (if tso { GUEST_ECN } else { 0 }, offload::TSO_ECN),
    ] {
        if features & feature != 0 {
            bits |= bit;
        }
    }
    // The kernel has one switch for both.
    let uso = GUEST_USO4 | GUEST_USO6;
    if features & uso == uso {
        bits |= offload::USO4 | offload::USO6;
    }
    bits
}
