//! Gives the guest's nics their addresses and routes.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use blixard_vmm_api::config::MacAddr;
use blixard_vmm_api::guest::NicAddresses;

use crate::devices::{self, Announcements};
use crate::netlink::{Message, Netlink};

/// How long a nic may take to appear.
const NIC_LIMIT: Duration = Duration::from_secs(10);
/// The loopback interface is the first one of every network namespace.
const LOOPBACK: i32 = 1;

/// What can go wrong with the network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no netlink socket.
    #[error("opening a netlink socket")]
    Netlink(#[source] io::Error),
    /// The nic has not appeared.
    #[error("no nic has the hardware address {0}")]
    NoNic(MacAddr),
    /// The kernel refuses a setting.
    #[error("{0}")]
    Refused(String, #[source] io::Error),
}

/// Applies everything.
///
/// # Errors
/// The first setting that is refused.
pub fn set_up(nics: &[NicAddresses], announcements: &Announcements) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open().map_err(NetworkError::Netlink)?;
    let mut ask = |what: String, message: Message| {
        netlink.request(&message).map_err(|source| NetworkError::Refused(what, source))
    };
    ask("bringing up the loopback interface".into(), Message::up(LOOPBACK, None))?;
    for nic in nics {
        let mac = nic.mac;
        let index = announcements
            .wait_for(NIC_LIMIT, || devices::nic(Path::new("/sys"), mac))
            .ok_or(NetworkError::NoNic(mac))?;
        for &(address, prefix) in &nic.addresses {
            ask(
                format!("giving {mac} the address {address}/{prefix}"),
                Message::address(index, address, prefix),
            )?;
        }
        ask(format!("bringing up {mac} with an MTU of {}", nic.mtu), Message::up(index, Some(nic.mtu)))?;
        for &gateway in &nic.gateways {
            let on_link = !nic.addresses.iter().any(|(address, prefix)| contains(*address, *prefix, gateway));
            ask(format!("routing over {gateway}"), Message::default_route(index, gateway, on_link))?;
        }
    }
    Ok(())
}

/// True if `other` begins with the same `prefix` bits as `address`.
fn contains(address: IpAddr, prefix: u8, other: IpAddr) -> bool {
    let common = match (address, other) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => return false,
    };
    common >= u32::from(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_is_on_the_link_by_prefix_only() {
        let inside = |a: &str, p, b: &str| contains(a.parse().unwrap(), p, b.parse().unwrap());
        assert!(inside("10.0.0.5", 24, "10.0.0.1"));
        assert!(!inside("10.0.0.5", 32, "10.0.0.1"));
        assert!(inside("10.0.0.5", 0, "192.0.2.1"));
        assert!(inside("fd00::5", 64, "fd00::1"));
        assert!(!inside("fd00::5", 64, "10.0.0.1"));
    }
}
