//! What a request may contain, beyond what its types and [`NetworkSpec::validate`] say. Pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use blixard_netd_api::{NetworkSpec, NicSpec, Subnet};

/// Most addresses of a nic.
pub const ADDRESSES_MAX: usize = 8;

/// Checks a network.
///
/// # Errors
/// What is wrong, as a sentence that names the field.
pub fn network(spec: &NetworkSpec) -> Result<(), String> {
    spec.validate()?;
    for subnet in &spec.subnets {
        let gateway = subnet.gateway;
        let special = match gateway {
            // This network, this host, link-local, reserved: RFC 6890 section 2.2.2.
            IpAddr::V4(a) => {
                let [first, ..] = a.octets();
                first == 0 || first >= 240 || a.is_link_local()
            }
            // Mapped and compatible addresses, link-local.
            IpAddr::V6(a) => a.is_unicast_link_local() || a.to_bits() >> 48 == 0,
        };
        if special || edge(*subnet, gateway) {
            return Err(format!("subnets: {subnet}: not an address of one computer"));
        }
    }
    Ok(())
}

/// Checks a nic in the subnets of its network.
///
/// # Errors
/// What is wrong, as a sentence that names the field.
pub fn nic(spec: &NicSpec, subnets: &[Subnet]) -> Result<(), String> {
    if !spec.mac.is_unicast() || spec.mac.0 == [0; 6] {
        return Err(format!("mac: {}: not an address of one device", spec.mac));
    }
    if spec.addresses.len() > ADDRESSES_MAX {
        return Err(format!("addresses: at most {ADDRESSES_MAX} are possible"));
    }
    let mut seen = BTreeSet::new();
    for address in &spec.addresses {
        if !seen.insert(address) {
            return Err(format!("addresses: {address} is there twice"));
        }
        let Some(subnet) = subnets.iter().find(|subnet| subnet.contains(*address)) else {
            let known: Vec<String> = subnets.iter().map(Subnet::to_string).collect();
            return Err(format!(
                "addresses: {address} is in no subnet of the network {} ({})",
                spec.network,
                known.join(", ")
            ));
        };
        if *address == subnet.gateway {
            return Err(format!("addresses: {address} is the gateway of the network"));
        }
        if edge(*subnet, *address) {
            return Err(format!("addresses: {address} is not an address of one computer in {subnet}"));
        }
    }
    Ok(())
}

/// True when one subnet contains the other.
pub fn overlap(a: Subnet, b: Subnet) -> bool {
    let wider = |wide: Subnet, narrow: Subnet| wide.prefix <= narrow.prefix && wide.contains(narrow.gateway);
    wider(a, b) || wider(b, a)
}

/// True for the first address of a subnet and, with IPv4, the last: the network and everybody (RFC 919), or the
/// routers' anycast address (RFC 4291 section 2.6.1).
fn edge(subnet: Subnet, address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            let host = u32::MAX.checked_shr(subnet.prefix.into()).unwrap_or(0);
            host != 0
                && (a & Ipv4Addr::from_bits(host) == Ipv4Addr::UNSPECIFIED || a.to_bits() & host == host)
        }
        IpAddr::V6(a) => {
            let host = u128::MAX.checked_shr(subnet.prefix.into()).unwrap_or(0);
            host != 0 && a & Ipv6Addr::from_bits(host) == Ipv6Addr::UNSPECIFIED
        }
    }
}
