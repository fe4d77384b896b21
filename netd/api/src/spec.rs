//! What a network and a nic shall be.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use blixard_vmm_api::VmId;
use blixard_vmm_api::config::MacAddr;
use serde::{Deserialize, Serialize};

/// Longest interface name in bytes (`IFNAMSIZ` - 1).
pub const INTERFACE_NAME_MAX: usize = 15;
/// Prefix of every interface that is ours.
pub const INTERFACE_PREFIX: &str = "bx";

/// Identity of a nic, also the name of its interface: `bxv` + the low 50 random bits of the VM's id + `-` + index.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NicId(String);

/// A text that cannot be the name of a nic or network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} has the form {form}")]
pub struct BadName {
    /// What was to be named.
    pub what: &'static str,
    /// What is possible.
    pub form: &'static str,
}

impl NicId {
    /// The nic with this index (0 to 9) of a VM.
    pub fn new(vm: VmId, index: u8) -> Self {
        let text: Vec<char> = vm.to_string().to_ascii_lowercase().chars().collect();
        let low: String = text.iter().skip(16).collect();
        Self(format!("{INTERFACE_PREFIX}v{low}-{}", index % 10))
    }

    /// The name of the interface.
    pub fn interface(&self) -> &str {
        &self.0
    }
}

impl FromStr for NicId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let known = text.strip_prefix("bxv").and_then(|rest| rest.split_once('-'));
        let fits = known.is_some_and(|(vm, index)| {
            vm.len() == 10
                && vm.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
                && index.len() == 1
                && index.bytes().all(|b| b.is_ascii_digit())
        });
        if fits { Ok(Self(text.into())) } else { Err(BadName { what: "a nic", form: "bxv0123456789-0" }) }
    }
}

impl TryFrom<String> for NicId {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<NicId> for String {
    fn from(id: NicId) -> Self {
        id.0
    }
}

impl fmt::Display for NicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A gateway address and the length of its prefix, for example `10.88.0.1/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subnet {
    /// Address of the gateway: the bridge.
    pub gateway: IpAddr,
    /// Prefix length in bits, at most 32 or 128.
    pub prefix: u8,
}

impl Subnet {
    /// True when `address` is of the same family and inside the prefix.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.gateway, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let shift = 32u32.saturating_sub(self.prefix.into());
                a.to_bits().checked_shr(shift) == b.to_bits().checked_shr(shift)
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let shift = 128u32.saturating_sub(self.prefix.into());
                a.to_bits().checked_shr(shift) == b.to_bits().checked_shr(shift)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.gateway, self.prefix)
    }
}

/// A network on this node: a bridge that is the gateway of its nics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Name: 1 to 12 lower-case letters, digits and hyphens, starting with a letter. The bridge is `bx-` + name, so a
    /// longer name of a user's network is shortened by whoever makes the plan.
    pub name: String,
    /// At most one subnet of each family, at least one.
    pub subnets: Vec<Subnet>,
    /// Let the nics reach what the host reaches, with the host's address (masquerade).
    pub nat: bool,
    /// Largest packet in bytes, 1280 (RFC 8200 section 5) to 9216.
    pub mtu: u16,
}

impl NetworkSpec {
    /// The name of the bridge.
    pub fn interface(&self) -> String {
        bridge_name(&self.name)
    }

    /// Checks names and ranges.
    ///
    /// # Errors
    /// What is wrong, as a sentence that names the field.
    pub fn validate(&self) -> Result<(), String> {
        validate_network_name(&self.name)?;
        if !(1280..=9216).contains(&self.mtu) {
            return Err("mtu: 1280 to 9216 bytes are possible".into());
        }
        let v4 = self.subnets.iter().filter(|s| s.gateway.is_ipv4()).count();
        let v6 = self.subnets.len() - v4;
        if self.subnets.is_empty() || v4 > 1 || v6 > 1 {
            return Err("subnets: one of each family at most, one at least".into());
        }
        for subnet in &self.subnets {
            let bits = if subnet.gateway.is_ipv4() { 8..=30 } else { 48..=126 };
            if !bits.contains(&subnet.prefix) {
                return Err(format!(
                    "subnets: {subnet}: {} to {} bits are possible",
                    bits.start(),
                    bits.end()
                ));
            }
            if subnet.gateway.is_multicast()
                || subnet.gateway.is_loopback()
                || subnet.gateway.is_unspecified()
            {
                return Err(format!("subnets: {subnet}: not an address of one computer"));
            }
        }
        Ok(())
    }
}

/// The name of the bridge of a network.
pub fn bridge_name(network: &str) -> String {
    format!("{INTERFACE_PREFIX}-{network}")
}

/// Checks the name of a network as in [`NetworkSpec::name`].
///
/// # Errors
/// What is possible, as a sentence that names the field.
pub fn validate_network_name(name: &str) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let named = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.bytes().all(plain);
    if !named || name.len() > 12 {
        return Err("name: 1 to 12 lower-case letters, digits and hyphens, starting with a letter".into());
    }
    Ok(())
}

/// A nic on this node: a TAP on the bridge of its network, which may only send from its own addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// Identity and interface name.
    pub id: NicId,
    /// Name of the network.
    pub network: String,
    /// Hardware address, unicast.
    pub mac: MacAddr,
    /// Addresses that the guest may use, inside the network's subnets, at most 8.
    pub addresses: Vec<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_nic_fits_an_interface_and_is_recognised() {
        let id = NicId::new(VmId::from_parts(1, u128::MAX), 0);
        assert!(id.interface().len() <= INTERFACE_NAME_MAX);
        assert_eq!(id.to_string().parse::<NicId>(), Ok(id));
        for bad in ["eth0", "bxv", "bxv0123456789-10", "bxv012345678/-0", "bx-default"] {
            assert!(bad.parse::<NicId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_subnet_contains_its_own_addresses_only() {
        let subnet = Subnet { gateway: "10.88.0.1".parse().unwrap(), prefix: 16 };
        assert!(subnet.contains("10.88.255.9".parse().unwrap()));
        assert!(!subnet.contains("10.89.0.9".parse().unwrap()));
        assert!(!subnet.contains("fd00::1".parse().unwrap()));
    }

    #[test]
    fn a_network_with_a_bad_field_is_refused_by_name() {
        let good = NetworkSpec {
            name: "default".into(),
            subnets: vec![Subnet { gateway: "10.88.0.1".parse().unwrap(), prefix: 16 }],
            nat: true,
            mtu: 1500,
        };
        assert_eq!(good.validate(), Ok(()));
        let bad = |change: fn(&mut NetworkSpec)| {
            let mut spec = good.clone();
            change(&mut spec);
            spec.validate().unwrap_err()
        };
        assert!(bad(|s| s.name = "a b".into()).starts_with("name"));
        assert!(bad(|s| s.name = "x".repeat(13)).starts_with("name"));
        assert!(bad(|s| s.mtu = 10).starts_with("mtu"));
        assert!(bad(|s| s.subnets[0].prefix = 33).starts_with("subnets"));
        assert!(bad(|s| s.subnets.clear()).starts_with("subnets"));
    }
}
