//! Finds devices by what the host knows of them (a disk by serial number, a nic by hardware address), and waits for
//! those that the kernel has not announced yet.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blixard_vmm_api::config::MacAddr;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// The kernel's announcements of devices (netlink(7), `NETLINK_KOBJECT_UEVENT`).
pub struct Announcements {
    socket: OwnedFd,
}

impl Announcements {
    /// Listens from now on: what is announced later wakes [`Self::wait_for`].
    ///
    /// # Errors
    /// The kernel has no such socket.
    pub fn listen() -> nix::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        // Group 1 is what the kernel sends; port id 0 lets the kernel choose ours.
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
        Ok(Self { socket })
    }

    /// Asks `probe` now and after each announcement until it has an answer; `None` when `limit` is over.
    pub fn wait_for<T>(&self, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        loop {
            if let Some(found) = probe() {
                return Some(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            // An interrupted wait and a lost announcement both mean: look again.
            let _woken = poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout);
            let mut announcement = [0; 4096];
            while recv(self.socket.as_raw_fd(), &mut announcement, MsgFlags::empty()).is_ok() {}
        }
    }
}

/// A short attribute file without white space around it; `None` if there is none.
fn attribute(path: &Path) -> Option<String> {
    let mut bytes = vec![];
    std::fs::File::open(path).ok()?.take(256).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    Some(text.trim_matches(|c: char| c.is_whitespace() || c == '\0').to_owned())
}

/// Names below a directory of sysfs with an attribute of each.
fn entries(directory: &Path, file: &str) -> Vec<(String, String)> {
    let Ok(list) = std::fs::read_dir(directory) else { return vec![] };
    let mut found: Vec<_> = list
        .flatten()
        .filter_map(|e| Some((e.file_name().into_string().ok()?, attribute(&e.path().join(file))?)))
        .collect();
    found.sort();
    found
}

/// The device node of the disk with this serial number; `sys` is where sysfs is mounted.
pub fn disk(sys: &Path, serial: &str) -> Option<PathBuf> {
    let found = entries(&sys.join("block"), "serial").into_iter().find(|(_, s)| s == serial)?;
    Some(Path::new("/dev").join(found.0))
}

/// Serial numbers of all disks that have one, for an error message.
pub fn serials(sys: &Path) -> Vec<String> {
    entries(&sys.join("block"), "serial").into_iter().map(|(_, serial)| serial).collect()
}

/// The interface index of the nic with this hardware address.
pub fn nic(sys: &Path, mac: MacAddr) -> Option<i32> {
    let net = sys.join("class/net");
    let found = entries(&net, "address").into_iter().find(|(_, a)| a.parse() == Ok(mac))?;
    attribute(&net.join(found.0).join("ifindex"))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_number_and_a_nic_by_its_address() {
        let sys = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("block/vda/serial", "volume");
        write("block/vdb/serial", "root\0\0\n");
        write("block/loop0/size", "0");
        write("class/net/lo/address", "00:00:00:00:00:00\n");
        write("class/net/eth0/address", "52:54:00:12:34:56\n");
        write("class/net/eth0/ifindex", "2\n");
        assert_eq!(disk(sys.path(), "root"), Some("/dev/vdb".into()));
        assert_eq!(disk(sys.path(), "other"), None);
        assert_eq!(serials(sys.path()), ["volume", "root"]);
        assert_eq!(nic(sys.path(), "52:54:00:12:34:56".parse().unwrap()), Some(2));
        assert_eq!(nic(sys.path(), "52:54:00:12:34:57".parse().unwrap()), None);
    }

    #[test]
    fn waiting_for_what_never_comes_ends() {
        let announcements = Announcements::listen().unwrap();
        assert_eq!(announcements.wait_for(Duration::from_millis(20), || None::<()>), None);
    }
}
