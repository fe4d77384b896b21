//! Which host number of a network is given next. Host numbers make both the IPv4 and the IPv6 address, so one table keeps
//! both unique.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::records::{NetworkRecord, NicRecord};

/// The host numbers that may be given: all but the network's own (0), the broadcast address (all ones) and the gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRange {
    last: u32,
    gateway_v4: u32,
    gateway_v6: u128,
}

impl HostRange {
    /// The range of this network; `None` when its subnets have no room or the wrong family.
    pub fn of(network: &NetworkRecord) -> Option<Self> {
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (network.v4.gateway, network.v6.gateway) else { return None };
        let bits = 32u32.checked_sub(network.v4.prefix.into()).filter(|b| (2..=24).contains(b))?;
        let ones = (1u32 << bits) - 1;
        let ones6 = !u128::MAX.checked_shl(128u32.checked_sub(network.v6.prefix.into())?).unwrap_or(0);
        Some(Self { last: ones - 1, gateway_v4: v4.to_bits() & ones, gateway_v6: v6.to_bits() & ones6 })
    }

    /// True when this number may be given to a VM.
    pub fn holds(self, host: u32) -> bool {
        (1..=self.last).contains(&host) && host != self.gateway_v4 && u128::from(host) != self.gateway_v6
    }

    /// The first free number at or after `next`, going round once.
    pub fn free(self, next: u32, taken: impl Fn(u32) -> bool) -> Option<u32> {
        let begin = if (1..=self.last).contains(&next) { next } else { 1 };
        (begin..=self.last).chain(1..begin).find(|host| self.holds(*host) && !taken(*host))
    }
}

/// The nic with this host number in `network`.
pub fn nic(network: &NetworkRecord, host: u32) -> Option<NicRecord> {
    let (IpAddr::V4(v4), IpAddr::V6(v6)) = (network.v4.gateway, network.v6.gateway) else { return None };
    let mask4 = u32::MAX.checked_shl(32u32.checked_sub(network.v4.prefix.into())?).unwrap_or(0);
    let mask6 = u128::MAX.checked_shl(128u32.checked_sub(network.v6.prefix.into())?).unwrap_or(0);
    Some(NicRecord {
        network: network.name.clone(),
        host,
        v4: Ipv4Addr::from_bits((v4.to_bits() & mask4) | host),
        v6: Ipv6Addr::from_bits((v6.to_bits() & mask6) | u128::from(host)),
    })
}

#[cfg(test)]
mod tests {
    use blixard_netd_api::Subnet;
    use proptest::prelude::*;

    use super::*;

    fn network(prefix: u8, gateway: &str) -> NetworkRecord {
        NetworkRecord {
            name: "default".into(),
            v4: Subnet { gateway: gateway.parse().unwrap(), prefix },
            v6: Subnet { gateway: "fd62:1::1".parse().unwrap(), prefix: 64 },
            nat: true,
            mtu: 1500,
            next_host: 0,
        }
    }

    #[test]
    fn the_addresses_of_a_nic_carry_its_number_in_both_families() {
        let nic = nic(&network(16, "10.88.0.1"), 0x1234).unwrap();
        assert_eq!(nic.v4.to_string(), "10.88.18.52");
        assert_eq!(nic.v6.to_string(), "fd62:1::1234");
        assert_eq!(nic.mac().0, [2, 0x62, 0, 0, 0x12, 0x34]);
    }

    #[test]
    fn a_small_network_gives_each_address_once_and_then_says_that_it_is_full() {
        let network = network(29, "10.88.0.3");
        let range = HostRange::of(&network).unwrap();
        let mut given = vec![];
        while let Some(host) = range.free(given.last().map_or(0, |h| h + 1), |h| given.contains(&h)) {
            given.push(host);
        }
        assert_eq!(given, [2, 4, 5, 6], "neither 0, the gateways 1 and 3 nor broadcast 7");
    }

    proptest! {
        #[test]
        fn any_given_number_is_free_and_never_special(next: u32, taken in proptest::collection::vec(0u32..64, 0..64)) {
            let network = network(26, "10.88.0.1");
            let range = HostRange::of(&network).unwrap();
            match range.free(next, |h| taken.contains(&h)) {
                Some(host) => prop_assert!(!taken.contains(&host) && (2..=62).contains(&host)),
                None => prop_assert!((2..=62).all(|h| taken.contains(&h))),
            }
        }
    }
}
