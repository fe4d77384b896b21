//! The networks and nics of this node. One caller at a time: the server puts a lock around it.

use std::collections::{BTreeMap, BTreeSet};

use blixard_netd_api::spec::INTERFACE_PREFIX;
use blixard_netd_api::{Inventory, NicId};

use crate::error::ChangeError;
use crate::firewall::Firewall;
use crate::link::{Link, LinkKind, Links};
use crate::nft::Filter;

/// The kernel, seen as networks and nics.
pub struct Node {
    pub(crate) links: Links,
    pub(crate) filter: Filter,
}

impl Node {
    /// Connects to the kernel, in the network namespace of the calling thread. Later calls must come from threads in the
    /// same namespace.
    ///
    /// # Errors
    /// The system's answer.
    pub fn open() -> Result<Self, ChangeError> {
        Ok(Self { links: Links::connect()?, filter: Filter::connect()? })
    }

    /// What exists on this node under our prefix.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn list(&self) -> Result<Inventory, ChangeError> {
        let links = self.links.list()?;
        let bridges: BTreeMap<u32, String> =
            links.iter().filter_map(|l| Some((l.index, network_name(l)?.to_owned()))).collect();
        let mut nics: Vec<(NicId, Option<String>)> = links
            .iter()
            .filter_map(|l| Some((nic_id(l)?, l.controller.and_then(|index| bridges.get(&index).cloned()))))
            .collect();
        nics.sort();
        let mut networks: Vec<String> = bridges.into_values().collect();
        networks.sort();
        Ok(Inventory { networks, nics })
    }

    /// The packet filter as it is. When it has to be read: without what belongs to interfaces that are gone.
    pub(crate) fn firewall(&self) -> Result<Firewall, ChangeError> {
        match self.filter.known() {
            Some(known) => Ok(known),
            None => self.read_firewall(),
        }
    }

    /// The packet filter as the kernel has it, without what belongs to interfaces that are gone.
    pub(crate) fn read_firewall(&self) -> Result<Firewall, ChangeError> {
        let mut found = self.filter.read()?;
        let links = self.links.list()?;
        let bridges: BTreeSet<&str> =
            links.iter().filter(|l| l.kind == LinkKind::Bridge).map(|l| l.name.as_str()).collect();
        let nics: BTreeSet<NicId> = links.iter().filter_map(nic_id).collect();
        found.networks.retain(|name, _| bridges.contains(name.as_str()));
        found.nics.retain(|id, _| nics.contains(id));
        Ok(found)
    }
}

/// The name of the network when this is the bridge of one.
pub(crate) fn network_name(link: &Link) -> Option<&str> {
    let rest = link.name.strip_prefix(INTERFACE_PREFIX)?.strip_prefix('-')?;
    (link.kind == LinkKind::Bridge).then_some(rest)
}

/// The id of the nic when this is the TAP of one.
pub(crate) fn nic_id(link: &Link) -> Option<NicId> {
    if link.kind == LinkKind::Tun { link.name.parse().ok() } else { None }
}
