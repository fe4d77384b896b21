//! Networks: a bridge with the gateway's addresses.

use blixard_netd_api::spec::{bridge_name, validate_network_name};
use blixard_netd_api::{NetworkSpec, Subnet};
use blixard_vmm_api::config::MacAddr;

use crate::error::ChangeError;
use crate::firewall::{Firewall, NetworkRules, link_local};
use crate::link::{Address, Link, LinkKind};
use crate::node::Node;
use crate::{check, sysctl};

impl Node {
    /// Makes or repairs a network.
    ///
    /// # Errors
    /// See [`ChangeError`]. What was done until then stays, and the next call completes it.
    pub fn ensure_network(&self, spec: &NetworkSpec) -> Result<(), ChangeError> {
        check::network(spec).map_err(ChangeError::Invalid)?;
        let bridge = spec.interface();
        let links = self.links.list()?;
        let addresses = self.links.addresses()?;
        let known = self.known_bridge(&bridge)?;
        let known = known.as_ref();
        refuse_overlap(spec, known, &links, &addresses)?;
        let mut firewall = self.firewall()?;
        refuse_gateway_in_use(spec, &firewall)?;
        if spec.nat {
            allow_forwarding(spec)?;
        }

        let gateways = spec.subnets.iter().map(|subnet| subnet.gateway).collect();
        firewall.networks.insert(bridge.clone(), NetworkRules { outbound: spec.nat, gateways });
        self.filter.apply(&firewall)?;

        let index = match known {
            Some(link) => link.index,
            None => self.links.add_bridge(&bridge)?,
        };
        self.links.set_bridge(index, &bridge, spec.mtu)?;
        let mac = bridge_mac(&spec.name);
        if known.is_none_or(|link| link.mac != Some(mac)) {
            self.links.set_mac(index, &bridge, mac)?;
        }
        self.set_addresses(index, &bridge, spec, &addresses)?;
        self.links.up(index, &bridge)?;
        for port in links.iter().filter(|l| l.controller == Some(index) && l.mtu != u32::from(spec.mtu)) {
            self.links.set_mtu(port.index, &port.name, spec.mtu.into())?;
        }
        Ok(())
    }

    /// Removes a network that has no nics.
    ///
    /// # Errors
    /// [`ChangeError::InUse`] while interfaces are attached, or the kernel's answer.
    pub fn remove_network(&self, name: &str) -> Result<(), ChangeError> {
        validate_network_name(name).map_err(ChangeError::Invalid)?;
        let bridge = bridge_name(name);
        if let Some(link) = self.known_bridge(&bridge)? {
            let links = self.links.list()?;
            let ports: Vec<&Link> = links.iter().filter(|port| port.controller == Some(link.index)).collect();
            if let Some(first) = ports.first() {
                return Err(ChangeError::InUse {
                    network: name.to_owned(),
                    count: ports.len(),
                    example: first.name.clone(),
                });
            }
            self.links.remove(link.index, &bridge)?;
        }
        let mut firewall = self.firewall()?;
        firewall.networks.remove(&bridge);
        Ok(self.filter.apply(&firewall)?)
    }

    /// The bridge of this name, if there is an interface of this name at all.
    pub(crate) fn known_bridge(&self, bridge: &str) -> Result<Option<Link>, ChangeError> {
        match self.links.find(bridge)? {
            Some(link) if link.kind != LinkKind::Bridge => {
                Err(ChangeError::Conflict(format!("the interface {bridge} exists and is no bridge")))
            }
            found => Ok(found),
        }
    }

    fn set_addresses(
        &self,
        index: u32,
        bridge: &str,
        spec: &NetworkSpec,
        found: &[Address],
    ) -> Result<(), ChangeError> {
        let mut wanted = spec.subnets.clone();
        if wanted.iter().any(|subnet| subnet.gateway.is_ipv6()) {
            // The kernel adds it once, when the bridge comes up; a neighbour needs it always (RFC 4291 section 2.8).
            wanted.push(Subnet { gateway: link_local(bridge_mac(&spec.name)).into(), prefix: 64 });
        }
        let own: Vec<&Address> = found.iter().filter(|a| a.index == index).collect();
        for old in own.iter().filter(|a| !is_link_local(a) && !wanted.contains(&a.subnet)) {
            self.links.remove_address(old, bridge)?;
        }
        for new in wanted.iter().filter(|s| !own.iter().any(|a| a.subnet == **s)) {
            self.links.add_address(index, bridge, *new)?;
        }
        Ok(())
    }
}

pub(crate) fn is_link_local(address: &Address) -> bool {
    match address.subnet.gateway {
        std::net::IpAddr::V4(_) => false,
        std::net::IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn refuse_overlap(
    spec: &NetworkSpec,
    own: Option<&Link>,
    links: &[Link],
    addresses: &[Address],
) -> Result<(), ChangeError> {
    for address in addresses.iter().filter(|a| own.is_none_or(|link| link.index != a.index)) {
        if let Some(subnet) = spec.subnets.iter().find(|subnet| check::overlap(**subnet, address.subnet)) {
            let holder = links.iter().find(|link| link.index == address.index);
            return Err(ChangeError::Conflict(format!(
                "subnets: {subnet} overlaps {} of the interface {}",
                address.subnet,
                holder.map_or("?", |link| &link.name)
            )));
        }
    }
    Ok(())
}

fn refuse_gateway_in_use(spec: &NetworkSpec, firewall: &Firewall) -> Result<(), ChangeError> {
    for subnet in &spec.subnets {
        if let Some((id, _)) = firewall.nics.iter().find(|(_, nic)| nic.addresses.contains(&subnet.gateway)) {
            return Err(ChangeError::Conflict(format!(
                "subnets: {subnet}: the address belongs to the nic {id}"
            )));
        }
    }
    Ok(())
}

fn allow_forwarding(spec: &NetworkSpec) -> Result<(), ChangeError> {
    if spec.subnets.iter().any(|subnet| subnet.gateway.is_ipv4()) {
        sysctl::forward_v4()?;
    }
    if spec.subnets.iter().any(|subnet| subnet.gateway.is_ipv6()) {
        sysctl::forward_v6()?;
    }
    Ok(())
}

/// The hardware address of a network's bridge: locally administered, the same on every node and after every repair, so
/// that a guest's entry for its gateway stays right. The low bytes are FNV-1a of the name.
pub(crate) fn bridge_mac(network: &str) -> MacAddr {
    let hash = network.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    MacAddr([0x02, a, b, c, d, e])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_bridge_is_unicast_local_and_depends_on_the_name_alone() {
        let a = bridge_mac("default");
        assert!(a.is_unicast() && a.0[0] & 2 == 2);
        assert_eq!(a, bridge_mac("default"));
        assert_ne!(a, bridge_mac("default2"));
    }
}
