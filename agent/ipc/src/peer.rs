//! Who is at the other end of a socket, as the kernel says.

use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt};

/// The process that connected (SO_PEERCRED: as it was when it connected).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Peer {
    /// The peer of a connected unix socket.
    ///
    /// # Errors
    /// The system's answer, for example when it is no unix socket.
    pub fn of(socket: &impl AsFd) -> Result<Self, nix::Error> {
        let found = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self { pid: found.pid(), uid: found.uid(), gid: found.gid() })
    }
}
