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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn subnet(text: &str) -> Subnet {
        let (gateway, prefix) = text.split_once('/').unwrap();
        Subnet { gateway: gateway.parse().unwrap(), prefix: prefix.parse().unwrap() }
    }

    #[test]
    fn subnets_overlap_when_they_share_an_address() {
        for (a, b, shared) in [
            ("10.0.0.1/8", "10.88.0.1/16", true),
            ("10.88.0.1/16", "10.89.0.1/16", false),
            ("10.88.0.1/24", "10.88.0.200/32", true),
            ("10.88.0.1/25", "10.88.0.200/25", false),
            ("0.0.0.0/0", "10.88.0.1/16", true),
            ("fd00::1/48", "fd00::1:0:0:1/64", true),
            ("fd00::1/64", "10.0.0.1/8", false),
            ("::/0", "fd00::1/64", true),
        ] {
            assert_eq!(overlap(subnet(a), subnet(b)), shared, "{a} {b}");
            assert_eq!(overlap(subnet(b), subnet(a)), shared, "{b} {a}");
        }
    }

    #[test]
    fn the_edges_of_a_subnet_are_no_computers() {
        for (text, address, at_edge) in [
            ("10.88.0.1/16", "10.88.0.0", true),
            ("10.88.0.1/16", "10.88.255.255", true),
            ("10.88.0.1/16", "10.88.1.0", false),
            ("10.88.0.1/30", "10.88.0.3", true),
            ("fd00::1/64", "fd00::", true),
            ("fd00::1/64", "fd00::ffff:ffff:ffff:ffff", false),
        ] {
            assert_eq!(edge(subnet(text), address.parse().unwrap()), at_edge, "{address} in {text}");
        }
    }

    proptest! {
        #[test]
        fn no_request_panics_and_what_passes_is_inside(
            bits in any::<u128>(), v6 in any::<bool>(), prefix in any::<u8>(), host in any::<u128>(), mac in any::<[u8; 6]>(),
        ) {
            let address = |bits: u128| match v6 {
                true => IpAddr::from(Ipv6Addr::from_bits(bits)),
                false => IpAddr::from(Ipv4Addr::from_bits(u32::try_from(bits >> 96).unwrap())),
            };
            let subnet = Subnet { gateway: address(bits), prefix };
            let spec = NetworkSpec { name: "a".into(), subnets: vec![subnet], nat: true, mtu: 1500 };
            let accepted = network(&spec).is_ok();
            prop_assert!(!accepted || overlap(subnet, subnet));
            // Half of the hosts are inside.
            let inside = if host % 2 == 0 { bits ^ (host >> prefix.min(127)) } else { host };
            let nic_spec = NicSpec {
                id: "bxv0123456789-0".parse().unwrap(),
                network: "a".into(),
                mac: blixard_vmm_api::config::MacAddr(mac),
                addresses: vec![address(inside)],
            };
            if nic(&nic_spec, &[subnet]).is_ok() {
                prop_assert!(subnet.contains(address(inside)) && address(inside) != subnet.gateway);
                prop_assert!(nic_spec.mac.is_unicast());
            }
        }
    }
}
