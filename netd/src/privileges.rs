//! Keeps CAP_NET_ADMIN and gives away the rest, for good.

use caps::{CapSet, Capability, CapsHashSet};

/// Why netd cannot run with exactly the privileges it needs.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// It has not the one it needs.
    #[error("CAP_NET_ADMIN is missing; run as root or with AmbientCapabilities=CAP_NET_ADMIN")]
    Missing,
    /// The kernel refused to take some away.
    #[error("cannot reduce the capabilities")]
    Reduce(#[source] caps::errors::CapsError),
    /// The kernel refused no_new_privs.
    #[error("cannot forbid new privileges")]
    NoNewPrivileges(#[source] nix::Error),
}

/// Leaves the calling thread, and all that it starts later, with CAP_NET_ADMIN only. To be called before the first thread.
///
/// The capability is also ambient: nft, which netd runs, needs it.
///
/// # Errors
/// See [`PrivilegeError`].
pub fn reduce() -> Result<(), PrivilegeError> {
    let wrong = PrivilegeError::Reduce;
    let kept = Capability::CAP_NET_ADMIN;
    let permitted = caps::read(None, CapSet::Permitted).map_err(wrong)?;
    if !permitted.contains(&kept) {
        return Err(PrivilegeError::Missing);
    }
    // Without CAP_SETPCAP the bounding set stays. It gives nothing by itself, and no_new_privs keeps programs from taking.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        // The effective set may be empty while the permitted one is not.
        caps::raise(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(wrong)?;
        let bounding = caps::read(None, CapSet::Bounding).map_err(wrong)?;
        for capability in bounding.into_iter().filter(|c| *c != kept) {
            caps::drop(None, CapSet::Bounding, capability).map_err(wrong)?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(wrong)?;
    let only: CapsHashSet = [kept].into_iter().collect();
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &only).map_err(wrong)?;
    }
    caps::raise(None, CapSet::Ambient, kept).map_err(wrong)?;
    nix::sys::prctl::set_no_new_privs().map_err(PrivilegeError::NoNewPrivileges)
}
