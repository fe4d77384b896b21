//! Nics: a TAP on the bridge of its network. The packet filter is there before the TAP and goes after it.

use std::os::fd::OwnedFd;

use blixard_netd_api::spec::{bridge_name, validate_network_name};
use blixard_netd_api::{NicId, NicSpec, Subnet};
use blixard_vmm_api::config::MacAddr;

use crate::check;
use crate::error::ChangeError;
use crate::firewall::{Firewall, NicRules};
use crate::link::{Link, LinkKind};
use crate::network::{bridge_mac, is_link_local};
use crate::node::Node;
use crate::tap::{self, TapError};

impl Node {
    /// Makes or repairs a nic; with `open`, answers its TAP.
    ///
    /// # Errors
    /// See [`ChangeError`]. A nic that did not exist before does not exist afterwards; one that did is completed by the next call.
    pub fn ensure_nic(&self, spec: &NicSpec, open: bool) -> Result<Option<OwnedFd>, ChangeError> {
        validate_network_name(&spec.network).map_err(ChangeError::Invalid)?;
        let bridge = self
            .known_bridge(&bridge_name(&spec.network))?
            .ok_or_else(|| ChangeError::NoNetwork(spec.network.clone()))?;
        let subnets = self.subnets(&bridge)?;
        let mut firewall = self.firewall()?;
        let intended = firewall.networks.get(&bridge.name).map(|rules| &rules.gateways);
        if intended.is_some_and(|all| all.iter().any(|a| !subnets.iter().any(|s| s.gateway == *a))) {
            return Err(ChangeError::Damaged(spec.network.clone()));
        }
        check::nic(spec, &subnets).map_err(ChangeError::Invalid)?;
        let known = self.known_tap(&spec.id)?;
        if refuse_double(spec, &firewall).is_err() {
            // The other one may be gone without netd: its TAP removed by hand.
            firewall = self.read_firewall()?;
            refuse_double(spec, &firewall)?;
        }

        let rules = NicRules { mac: spec.mac, addresses: spec.addresses.iter().copied().collect() };
        let before = firewall.nics.insert(spec.id.clone(), rules);
        self.filter.apply(&firewall)?;
        let result = self.connect_tap(spec, open, &bridge, before.map(|rules| rules.mac));
        if result.is_err() && known.is_none() {
            // The reason for the failure is what the caller has to know; what cannot be undone now is removed by the
            // next request about this nic.
            if let Err(error) = self.remove_nic(&spec.id) {
                tracing::warn!(nic = %spec.id, %error, "cannot undo a nic that was half made");
            }
        }
        result
    }

    /// Removes a nic, open or not.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn remove_nic(&self, id: &NicId) -> Result<(), ChangeError> {
        if let Some(link) = self.known_tap(id)? {
            self.links.remove(link.index, &link.name)?;
        }
        let mut firewall = self.firewall()?;
        firewall.nics.remove(id);
        Ok(self.filter.apply(&firewall)?)
    }

    fn connect_tap(
        &self,
        spec: &NicSpec,
        open: bool,
        bridge: &Link,
        mac_before: Option<MacAddr>,
    ) -> Result<Option<OwnedFd>, ChangeError> {
        let name = spec.id.interface();
        let tap = match tap::open(name) {
            Ok(tap) => Some(tap),
            // A TAP that is in use has the right type, or its user could not use it.
            Err(TapError::Busy(_)) if !open => None,
            Err(error) => return Err(error.into()),
        };
        let index = self.links.get(name)?.index;
        self.links.forbid_own_address(index, name)?;
        self.links.set_mtu(index, name, bridge.mtu)?;
        self.links.attach(index, bridge.index, name)?;
        if let Some(old) = mac_before.filter(|old| *old != spec.mac) {
            self.links.remove_forwarding(index, name, old)?;
        }
        self.links.add_forwarding(index, name, spec.mac)?;
        self.links.up(index, name)?;
        Ok(tap.filter(|_| open))
    }

    /// The TAP of a nic, if there is an interface of this name at all.
    fn known_tap(&self, id: &NicId) -> Result<Option<Link>, ChangeError> {
        match self.links.find(id.interface())? {
            Some(link) if link.kind != LinkKind::Tun => {
                Err(ChangeError::Conflict(format!("the interface {id} exists and is no TAP")))
            }
            found => Ok(found),
        }
    }

    fn subnets(&self, bridge: &Link) -> Result<Vec<Subnet>, ChangeError> {
        let addresses = self.links.addresses()?;
        let own = addresses.iter().filter(|a| a.index == bridge.index && !is_link_local(a));
        Ok(own.map(|address| address.subnet).collect())
    }
}

fn refuse_double(spec: &NicSpec, firewall: &Firewall) -> Result<(), ChangeError> {
    if spec.mac == bridge_mac(&spec.network) {
        return Err(ChangeError::Conflict(format!(
            "mac: {} belongs to the gateway of the network",
            spec.mac
        )));
    }
    for (id, other) in firewall.nics.iter().filter(|(id, _)| **id != spec.id) {
        if other.mac == spec.mac {
            return Err(ChangeError::Conflict(format!("mac: {} belongs to the nic {id}", spec.mac)));
        }
        if let Some(address) = spec.addresses.iter().find(|address| other.addresses.contains(address)) {
            return Err(ChangeError::Conflict(format!("addresses: {address} belongs to the nic {id}")));
        }
    }
    Ok(())
}
