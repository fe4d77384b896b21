//! What may pass, as a value; pure. [`Firewall::ruleset`] is its text for nft, [`Firewall::read`] the way back.
//!
//! Two tables named `blixard`. All that differs between nodes is in their sets, so the number of rules a packet meets does
//! not grow with the number of nics, and reading the sets back gives the whole value.
//!
//! `table bridge` holds every frame of a guest to its nic's own hardware and IP addresses, before the bridge has learned or
//! forwarded anything. `table inet` decides what leaves a network: to the outside with the host's address where the
//! network wants it, never into another network.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv6Addr};

use blixard_netd_api::NicId;
use blixard_vmm_api::config::MacAddr;
use serde_json::Value;

/// Name of both tables.
pub const TABLE: &str = "blixard";
/// Family of the table for frames.
const BRIDGE: &str = "bridge";
/// Family of the table for packets.
const INET: &str = "inet";

/// What may pass on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Networks by the name of their bridge.
    pub networks: BTreeMap<String, NetworkRules>,
    /// Nics.
    pub nics: BTreeMap<NicId, NicRules>,
}

/// What the packets of a network may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkRules {
    /// They may leave the host, with its address.
    pub outbound: bool,
    /// Addresses of the bridge.
    pub gateways: BTreeSet<IpAddr>,
}

/// What a nic may send from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NicRules {
    /// Its hardware address.
    pub mac: MacAddr,
    /// Its addresses; the link-local one that follows from `mac` is always allowed and not listed.
    pub addresses: BTreeSet<IpAddr>,
}

/// The link-local address that follows from a hardware address (RFC 4291 appendix A).
pub fn link_local(mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, g] = mac.0;
    let pair = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, pair(a ^ 2, b), pair(c, 0xff), pair(0xfe, d), pair(e, g))
}

impl Firewall {
    /// Nothing to hold back: there need be no tables.
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty() && self.nics.is_empty()
    }

    /// The text that makes the kernel's tables equal to this, in one transaction, whatever they were.
    pub fn ruleset(&self) -> String {
        let mut text = String::new();
        for family in [BRIDGE, INET] {
            // Adding first makes deleting possible on a host where the table does not exist.
            text.push_str(&format!("add table {family} {TABLE}\ndelete table {family} {TABLE}\n"));
        }
        if !self.is_empty() {
            for (family, chains) in [(BRIDGE, BRIDGE_CHAINS), (INET, INET_CHAINS)] {
                text.push_str(&format!("table {family} {TABLE} {{\n"));
                self.sets()
                    .iter()
                    .filter(|set| set.family == family)
                    .for_each(|set| text.push_str(&set.to_string()));
                text.push_str(chains);
                text.push_str("}\n");
            }
        }
        text
    }

    /// The text that makes the kernel's tables equal to this, in one transaction, when they are equal to `before`.
    pub fn ruleset_after(&self, before: &Self) -> String {
        if self.is_empty() || before.is_empty() {
            return self.ruleset();
        }
        let (old, new) = (before.with_nics_unlike(self).sets(), self.with_nics_unlike(before).sets());
        let mut text = String::new();
        // What moves from one nic to another has to go first.
        for (verb, from, to) in [("delete", &old, &new), ("add", &new, &old)] {
            for (set, other) in from.iter().zip(to) {
                for element in set.elements.difference(&other.elements) {
                    let Set { family, name, .. } = set;
                    text.push_str(&format!("{verb} element {family} {TABLE} {name} {{ {element} }}\n"));
                }
            }
        }
        text
    }

    /// This without the nics that are the same in `other`. Networks stay: they may share elements.
    fn with_nics_unlike(&self, other: &Self) -> Self {
        let unlike = self.nics.iter().filter(|(id, rules)| other.nics.get(*id) != Some(rules));
        Self {
            networks: self.networks.clone(),
            nics: unlike.map(|(id, rules)| (id.clone(), rules.clone())).collect(),
        }
    }

    /// All sets of both tables, always the same ones in the same order.
    fn sets(&self) -> Vec<Set> {
        let mut sets: Vec<Set> = self.bridge_sets().into();
        sets.extend(self.inet_sets());
        sets
    }

    fn bridge_sets(&self) -> [Set; 4] {
        let mut macs = Set::new(BRIDGE, "macs", "type ifname . ether_addr");
        let mut v4 = Set::new(BRIDGE, "v4", "type ifname . ipv4_addr");
        let mut v6 = Set::new(BRIDGE, "v6", "type ifname . ipv6_addr");
        let mut targets = Set::new(BRIDGE, "targets", "typeof iifname . @th,64,128");
        for (id, nic) in &self.nics {
            macs.pair(id, nic.mac);
            let own = IpAddr::V6(link_local(nic.mac));
            for address in nic.addresses.iter().chain([&own]) {
                match address {
                    IpAddr::V4(address) => v4.pair(id, address),
                    IpAddr::V6(address) => {
                        v6.pair(id, address);
                        targets.pair(id, format_args!("{:#034x}", address.to_bits()));
                    }
                }
            }
        }
        [macs, v4, v6, targets]
    }

    fn inet_sets(&self) -> [Set; 6] {
        let mut outbound = Set::new(INET, "outbound", "type ifname");
        let mut same = Set::new(INET, "same", "type ifname . ifname");
        let mut gateways4 = Set::new(INET, "gateways4", "type ipv4_addr");
        let mut gateways6 = Set::new(INET, "gateways6", "type ipv6_addr");
        let mut own4 = Set::new(INET, "own4", "type ifname . ipv4_addr");
        let mut own6 = Set::new(INET, "own6", "type ifname . ipv6_addr");
        for (bridge, network) in &self.networks {
            if network.outbound {
                outbound.elements.insert(format!("\"{bridge}\""));
            }
            same.pair(bridge, format_args!("\"{bridge}\""));
            for gateway in &network.gateways {
                let (all, own) = match gateway {
                    IpAddr::V4(_) => (&mut gateways4, &mut own4),
                    IpAddr::V6(_) => (&mut gateways6, &mut own6),
                };
                all.elements.insert(gateway.to_string());
                own.pair(bridge, gateway);
            }
        }
        [outbound, same, gateways4, gateways6, own4, own6]
    }

    /// Reads the tables as `nft -j list table` prints them; `None` where there is no such table. An entry that is not ours
    /// is passed over, so the next [`Self::ruleset`] is without it.
    pub fn read(bridge: Option<&Value>, inet: Option<&Value>) -> Self {
        let mut found = Self::default();
        if let Some(bridge) = bridge {
            found.nics = read_nics(bridge);
        }
        if let Some(inet) = inet {
            found.networks = read_networks(inet);
        }
        found
    }
}

fn read_nics(bridge: &Value) -> BTreeMap<NicId, NicRules> {
    let mut nics: BTreeMap<NicId, NicRules> = pairs(bridge, "macs")
        .filter_map(|(id, mac)| Some((id.parse().ok()?, mac.parse().ok()?)))
        .map(|(id, mac)| (id, NicRules { mac, addresses: BTreeSet::new() }))
        .collect();
    for set in ["v4", "v6"] {
        for (id, address) in pairs(bridge, set) {
            let (Ok(id), Ok(address)) = (id.parse::<NicId>(), address.parse::<IpAddr>()) else { continue };
            let Some(nic) = nics.get_mut(&id) else { continue };
            if address != IpAddr::V6(link_local(nic.mac)) {
                nic.addresses.insert(address);
            }
        }
    }
    nics
}

fn read_networks(inet: &Value) -> BTreeMap<String, NetworkRules> {
    let mut networks: BTreeMap<String, NetworkRules> =
        pairs(inet, "same").map(|(bridge, _)| (bridge.to_owned(), NetworkRules::default())).collect();
    for bridge in elements(inet, "outbound").filter_map(Value::as_str) {
        if let Some(network) = networks.get_mut(bridge) {
            network.outbound = true;
        }
    }
    for set in ["own4", "own6"] {
        for (bridge, gateway) in pairs(inet, set) {
            if let (Some(network), Ok(gateway)) = (networks.get_mut(bridge), gateway.parse()) {
                network.gateways.insert(gateway);
            }
        }
    }
    networks
}

/// The elements of a set in the output of `nft -j` (libnftables-json(5), SET).
fn elements<'a>(listing: &'a Value, name: &'a str) -> impl Iterator<Item = &'a Value> {
    let objects = listing.get("nftables").and_then(Value::as_array).into_iter().flatten();
    objects
        .filter_map(|object| object.get("set"))
        .filter(move |set| set.get("name").and_then(Value::as_str) == Some(name))
        .filter_map(|set| set.get("elem").and_then(Value::as_array))
        .flatten()
}

/// The elements of a set of pairs.
fn pairs<'a>(listing: &'a Value, name: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    elements(listing, name).filter_map(|element| {
        match element.get("concat").and_then(Value::as_array).map(Vec::as_slice) {
            Some([Value::String(a), Value::String(b)]) => Some((a.as_str(), b.as_str())),
            _ => None,
        }
    })
}

/// A set of one of the tables.
struct Set {
    family: &'static str,
    name: &'static str,
    kind: &'static str,
    elements: BTreeSet<String>,
}

impl Set {
    fn new(family: &'static str, name: &'static str, kind: &'static str) -> Self {
        Self { family, name, kind, elements: BTreeSet::new() }
    }

    fn pair(&mut self, interface: impl Display, value: impl Display) {
        self.elements.insert(format!("\"{interface}\" . {value}"));
    }
}

impl Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  set {} {{\n    {}\n", self.name, self.kind)?;
        // nft has no empty list.
        if !self.elements.is_empty() {
            f.write_str("    elements = {\n")?;
            for element in &self.elements {
                writeln!(f, "      {element},")?;
            }
            f.write_str("    }\n")?;
        }
        f.write_str("  }\n")
    }
}

/// Frames of guests. Everything that is not allowed by name is dropped: other protocols (VLAN tags, LLC and so STP), and
/// what only a router, a DHCP server or a neighbour with that address may say (RFC 6105, RFC 7610).
const BRIDGE_CHAINS: &str = r#"
  chain prerouting {
    type filter hook prerouting priority -300; policy accept;
    iifname "bxv*" jump from_nic
  }
  chain input {
    type filter hook input priority 0; policy accept;
    # The bridge hands these groups to the host without passing prerouting.
    iifname "bxv*" ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
  }
  chain from_nic {
    iifname . ether saddr != @macs drop
    ether type vmap { ip : goto from_nic_v4, arp : goto from_nic_arp, ip6 : goto from_nic_v6 }
    drop
  }
  chain from_nic_v4 {
    iifname . ip saddr != @v4 drop
    udp sport 67 drop
    accept
  }
  chain from_nic_arp {
    arp htype != 1 drop
    arp ptype != ip drop
    arp hlen != 6 drop
    arp plen != 4 drop
    iifname . arp saddr ether != @macs drop
    # Probes for a duplicate of its own address (RFC 5227).
    arp operation request arp saddr ip 0.0.0.0 iifname . arp daddr ip @v4 accept
    iifname . arp saddr ip != @v4 drop
    accept
  }
  chain from_nic_v6 {
    # The unspecified address is for finding duplicates and joining groups before there is an address (RFC 4862, RFC 3810).
    ip6 saddr :: icmpv6 type nd-neighbor-solicit iifname . @th,64,128 @targets accept
    ip6 saddr :: icmpv6 type { nd-router-solicit, mld-listener-report, mld2-listener-report } accept
    iifname . ip6 saddr != @v6 drop
    icmpv6 type { nd-router-advert, nd-redirect } drop
    icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @targets drop
    udp sport 547 drop
    accept
  }
"#;

/// Packets that a network routes. `same` is not redundant: with br_netfilter, frames inside one bridge pass here too.
const INET_CHAINS: &str = r#"
  chain input {
    type filter hook input priority filter; policy accept;
    iifname "bx-*" ip daddr @gateways4 iifname . ip daddr != @own4 drop
    iifname "bx-*" ip6 daddr @gateways6 iifname . ip6 daddr != @own6 drop
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    iifname . oifname @same accept
    iifname "bx-*" oifname "bx-*" drop
    iifname "bx-*" iifname != @outbound drop
    # Link-local is not to be routed (RFC 3927 section 7); here lives the metadata service of clouds.
    iifname "bx-*" ip daddr 169.254.0.0/16 drop
    oifname "bx-*" ct state established,related accept
    oifname "bx-*" drop
  }
  chain postrouting {
    type nat hook postrouting priority srcnat; policy accept;
    iifname @outbound oifname != "bx-*" masquerade
  }
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Firewall {
        let mut sample = Firewall::default();
        let addresses = |texts: [&str; 2]| texts.map(|text| text.parse().unwrap()).into();
        for (n, text) in [(1, "bxv0000000001-0"), (2, "bxv0000000002-0")] {
            let addresses = addresses([&format!("10.88.0.1{n}"), &format!("fd88::1{n}")]);
            let rules = NicRules { mac: MacAddr([0x52, 0x54, 0, 0, 0, n]), addresses };
            sample.nics.insert(text.parse().unwrap(), rules);
        }
        let network = NetworkRules { outbound: true, gateways: addresses(["10.88.0.1", "fd88::1"]) };
        sample.networks.insert("bx-default".into(), network);
        sample
    }

    #[test]
    fn the_ruleset_of_two_nics_is_the_one_in_the_tests_folder() {
        assert_eq!(sample().ruleset(), include_str!("../tests/two_nics.nft"));
    }

    #[test]
    fn an_empty_firewall_leaves_no_table() {
        let text = Firewall::default().ruleset();
        assert!(text.contains("delete table bridge blixard") && text.contains("delete table inet blixard"));
        assert!(!text.contains('{'));
        assert_eq!(Firewall::default().ruleset_after(&sample()), text);
    }

    #[test]
    fn a_difference_is_written_without_the_rest() {
        let before = sample();
        let mut after = before.clone();
        let (id, moved) = after.nics.pop_first().unwrap();
        after.nics.insert("bxv0000000003-0".parse().unwrap(), moved);
        let text = after.ruleset_after(&before);
        let first_add = text.find("add ").unwrap();
        assert!(text.rfind("delete ").unwrap() < first_add, "{text}");
        assert!(
            text.contains(&format!("delete element bridge blixard v4 {{ \"{id}\" . 10.88.0.11 }}\n")),
            "{text}"
        );
        assert!(
            text.contains("add element bridge blixard v4 { \"bxv0000000003-0\" . 10.88.0.11 }\n"),
            "{text}"
        );
        assert!(!text.contains("bxv0000000002-0") && !text.contains("inet"), "{text}");
        assert_eq!(before.ruleset_after(&before), "");
    }

    #[test]
    fn the_link_local_address_is_the_one_the_guest_makes() {
        let mac = MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(link_local(mac), "fe80::5054:ff:fe12:3456".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn what_is_not_ours_in_a_listing_is_passed_over() {
        let listing = |name: &str, elements: Value| serde_json::json!({"nftables": [{"metainfo": {}}, {"set": {"name": name, "elem": elements}}, {"rule": {}}]});
        let pair = |a: &str, b: &str| serde_json::json!({"concat": [a, b]});
        let macs = serde_json::json!([
            pair("eth0", "52:54:00:00:00:01"),
            pair("bxv0000000001-0", "nonsense"),
            pair("bxv0000000002-0", "52:54:00:00:00:02"),
            "bxv0000000003-0",
            {"concat": ["bxv0000000004-0"]},
            7,
        ]);
        let found = Firewall::read(Some(&listing("macs", macs)), Some(&Value::Null));
        let ids: Vec<String> = found.nics.keys().map(NicId::to_string).collect();
        assert_eq!(ids, ["bxv0000000002-0"]);
        assert!(Firewall::read(None, Some(&listing("own4", pair("bx-a", "10.0.0.1")))).is_empty());
    }
}
