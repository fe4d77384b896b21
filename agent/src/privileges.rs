//! The capabilities that the agent keeps. All others leave every set, so that a fault in this process is worth less.

use caps::{CapSet, Capability, CapsHashSet};

/// Each capability with its reason. The systemd unit's `CapabilityBoundingSet=` is the same list.
pub const KEPT: [(Capability, &str); 7] = [
    (
        Capability::CAP_SYS_ADMIN,
        "namespaces, empty root and pivot_root of a jail; cgroup.kill across namespaces",
    ),
    (Capability::CAP_SETUID, "the jailed process becomes the VM's user"),
    (Capability::CAP_SETGID, "the jailed process becomes the VM's group and leaves all others"),
    (Capability::CAP_SETPCAP, "the jailed process empties its bounding set"),
    (Capability::CAP_DAC_OVERRIDE, "connecting to netd's socket, which belongs to netd's user"),
    (Capability::CAP_KILL, "ending a VMM, which has another user"),
    (Capability::CAP_SYS_RESOURCE, "more descriptors for the agent of many VMs"),
];

/// Gives up all capabilities that are not in [`KEPT`].
///
/// # Errors
/// The kernel's answer.
pub fn reduce() -> Result<(), caps::errors::CapsError> {
    let kept: CapsHashSet = KEPT.iter().map(|(capability, _)| *capability).collect();
    for capability in caps::all() {
        if !kept.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability)? {
            caps::drop(None, CapSet::Bounding, capability)?;
        }
    }
    let held = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = held.intersection(&kept).copied().collect();
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)?;
    Ok(())
}
