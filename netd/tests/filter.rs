//! What may pass and what not, shown with frames of hand-made guests, in a network namespace of the test's own.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout))]

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

use blixard_netd::Node;
use blixard_netd::firewall::{Firewall, NetworkRules, NicRules};
use blixard_netd::nft::Filter;
use blixard_netd_api::NicId;
use blixard_vmm_api::config::MacAddr;
use proptest::prelude::*;
use support::nft;
use support::{
    ARP, BROADCAST, Guest, IPV4, IPV6, alone, arp, contains, default_network, echo, ethernet, icmp6, ip,
    ipv4, network, nic, run, udp, udp6, unreachable,
};

const EVIL: &[u8] = b"this must not arrive";

fn v4(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

fn v6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

fn mac_of(interface: &str) -> MacAddr {
    ip(&format!("-br link show {interface}")).split_whitespace().nth(2).unwrap().parse().unwrap()
}

/// A network with two guests.
fn neighbours(node: &Node) -> (Guest, Guest) {
    node.ensure_network(&default_network()).unwrap();
    let a = nic(1, "default", &["10.88.0.11", "fd88::11"]);
    let b = nic(2, "default", &["10.88.0.12", "fd88::12"]);
    (Guest::ensure(node, &a), Guest::ensure(node, &b))
}

/// What a neighbour sees of `frames`: those that came before an honest one sent after them.
fn seen(from: &mut Guest, to: &mut Guest, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    for frame in frames {
        from.send(frame);
    }
    let fence = b"an honest frame";
    from.send(&ethernet(to.mac, from.mac, IPV4, &ipv4(from.v4, to.v4, 17, &udp(1, 2, fence))));
    let seen = to.receive_until(fence);
    // Frames of the bridge itself, such as its group memberships, are none of the guest's. A bridge may cut padding off.
    let same = |a: &[u8], b: &[u8]| a.starts_with(b) || b.starts_with(a);
    frames.iter().filter(|sent| seen.iter().any(|frame| same(frame, sent))).cloned().collect()
}

/// A packet of `a` to `b` inside one or two VLAN tags.
fn tagged(a: &Guest, b: &Guest, tags: &[u16]) -> Vec<u8> {
    let mut inner: Vec<u8> =
        tags.iter().skip(1).flat_map(|tag| [0, 5, tag.to_be_bytes()[0], tag.to_be_bytes()[1]]).collect();
    inner.splice(0..0, [0, 5]);
    inner.extend(IPV4.to_be_bytes());
    inner.extend(ipv4(a.v4, b.v4, 17, &udp(1, 2, EVIL)));
    let inner: Vec<u8> = inner;
    ethernet(b.mac, a.mac, tags[0], &inner)
}

#[test]
fn a_guest_cannot_speak_with_another_voice() {
    let Some(node) = alone() else { return };
    let (mut a, mut b) = neighbours(&node);
    let other = MacAddr([0x52, 0x54, 0, 0, 0, 0x77]);
    let (gateway, all) = (v4("10.88.0.1"), v6("ff02::1"));
    let data = udp(1000, 2000, EVIL);
    let target = |address: Ipv6Addr| address.octets();
    let odd_arp = |at: std::ops::Range<usize>, field: &[u8]| {
        let mut honest = arp(1, (a.mac, a.v4), (MacAddr([0; 6]), b.v4));
        honest[at].copy_from_slice(field);
        ethernet(BROADCAST, a.mac, ARP, &honest)
    };
    let evil: Vec<(&str, Vec<u8>)> = vec![
        ("other hardware address", ethernet(b.mac, other, IPV4, &ipv4(a.v4, b.v4, 17, &data))),
        ("hardware address of the neighbour", ethernet(b.mac, b.mac, IPV4, &ipv4(a.v4, b.v4, 17, &data))),
        ("other IPv4 address", ethernet(b.mac, a.mac, IPV4, &ipv4(v4("10.88.0.99"), b.v4, 17, &data))),
        ("IPv4 address of the gateway", ethernet(BROADCAST, a.mac, IPV4, &ipv4(gateway, b.v4, 17, &data))),
        ("IPv4 address of nobody", ethernet(b.mac, a.mac, IPV4, &ipv4(v4("0.0.0.0"), b.v4, 17, &data))),
        (
            "IPv4 address of the outside",
            ethernet(b.mac, a.mac, IPV4, &ipv4(v4("192.0.2.1"), b.v4, 17, &data)),
        ),
        ("DHCP server", ethernet(b.mac, a.mac, IPV4, &ipv4(a.v4, b.v4, 17, &udp(67, 68, EVIL)))),
        ("ARP answer for the gateway", ethernet(b.mac, a.mac, ARP, &arp(2, (a.mac, gateway), (b.mac, b.v4)))),
        (
            "ARP with another hardware address",
            ethernet(b.mac, a.mac, ARP, &arp(2, (other, a.v4), (b.mac, b.v4))),
        ),
        ("ARP probe for the neighbour", {
            ethernet(BROADCAST, a.mac, ARP, &arp(1, (a.mac, v4("0.0.0.0")), (MacAddr([0; 6]), b.v4)))
        }),
        ("ARP of another hardware", odd_arp(0..2, &[0, 6])),
        ("ARP of another protocol", odd_arp(2..4, &[0x86, 0xdd])),
        ("ARP with long hardware addresses", odd_arp(4..5, &[8])),
        ("ARP with long addresses", odd_arp(5..6, &[16])),
        ("other IPv6 address", ethernet(b.mac, a.mac, IPV6, &udp6(v6("fd88::99"), b.v6, (1, 2), EVIL))),
        (
            "IPv6 address of the gateway",
            ethernet(b.mac, a.mac, IPV6, &udp6(v6("fd88::1"), b.v6, (1, 2), EVIL)),
        ),
        ("link-local address of the neighbour", {
            ethernet(b.mac, a.mac, IPV6, &udp6(b.link_local(), b.v6, (1, 2), EVIL))
        }),
        ("IPv6 address of nobody", ethernet(b.mac, a.mac, IPV6, &udp6(v6("::"), b.v6, (1, 2), EVIL))),
        ("DHCPv6 server", ethernet(b.mac, a.mac, IPV6, &udp6(a.link_local(), b.v6, (547, 546), EVIL))),
        ("router advertisement", ethernet(b.mac, a.mac, IPV6, &icmp6(a.link_local(), all, 134, EVIL))),
        ("redirect", ethernet(b.mac, a.mac, IPV6, &icmp6(a.link_local(), all, 137, EVIL))),
        ("advertisement for the gateway", {
            ethernet(b.mac, a.mac, IPV6, &icmp6(a.v6, b.v6, 136, &target(v6("fd88::1"))))
        }),
        ("advertisement for the neighbour", {
            ethernet(b.mac, a.mac, IPV6, &icmp6(a.link_local(), all, 136, &target(b.v6)))
        }),
        ("search for a duplicate of the neighbour", {
            ethernet(b.mac, a.mac, IPV6, &icmp6(v6("::"), all, 135, &target(b.v6)))
        }),
        ("VLAN tag", tagged(&a, &b, &[0x8100])),
        ("service VLAN tag", tagged(&a, &b, &[0x88a8])),
        ("two VLAN tags", tagged(&a, &b, &[0x88a8, 0x8100])),
        (
            "spanning tree",
            ethernet(MacAddr([1, 0x80, 0xc2, 0, 0, 0]), a.mac, 38, &[0x42, 0x42, 3, 0, 0, 0, 0, 0]),
        ),
        ("unknown protocol", ethernet(BROADCAST, a.mac, 0x88b5, EVIL)),
    ];
    for br_netfilter in [true, false] {
        if !support::frames_pass_the_ip_filter(br_netfilter) {
            continue;
        }
        for (what, frame) in &evil {
            let frame = std::slice::from_ref(frame);
            assert!(seen(&mut a, &mut b, frame).is_empty(), "passed: {what}, br_netfilter {br_netfilter}");
        }
    }
}

#[test]
fn a_guest_may_say_everything_that_is_its_own() {
    let Some(node) = alone() else { return };
    let (mut a, mut b) = neighbours(&node);
    let nobody = (MacAddr([0; 6]), b.v4);
    let all = v6("ff02::1");
    let honest: Vec<(&str, Vec<u8>)> = vec![
        ("IPv4", ethernet(b.mac, a.mac, IPV4, &ipv4(a.v4, b.v4, 17, &udp(1, 2, b"hello")))),
        ("IPv6", ethernet(b.mac, a.mac, IPV6, &udp6(a.v6, b.v6, (1, 2), b"hello"))),
        ("IPv6 from the link-local address", {
            ethernet(b.mac, a.mac, IPV6, &udp6(a.link_local(), b.v6, (1, 2), b"hello"))
        }),
        ("ARP question", ethernet(BROADCAST, a.mac, ARP, &arp(1, (a.mac, a.v4), nobody))),
        ("ARP answer", ethernet(b.mac, a.mac, ARP, &arp(2, (a.mac, a.v4), (b.mac, b.v4)))),
        ("ARP probe for itself", {
            ethernet(BROADCAST, a.mac, ARP, &arp(1, (a.mac, v4("0.0.0.0")), (MacAddr([0; 6]), a.v4)))
        }),
        ("search for a duplicate of itself", {
            ethernet(b.mac, a.mac, IPV6, &icmp6(v6("::"), all, 135, &a.v6.octets()))
        }),
        ("search for a duplicate of its link-local address", {
            ethernet(b.mac, a.mac, IPV6, &icmp6(v6("::"), all, 135, &a.link_local().octets()))
        }),
        ("solicitation of the neighbour", {
            ethernet(b.mac, a.mac, IPV6, &icmp6(a.v6, all, 135, &b.v6.octets()))
        }),
        ("advertisement of itself", ethernet(b.mac, a.mac, IPV6, &icmp6(a.v6, b.v6, 136, &a.v6.octets()))),
        ("group membership", ethernet(b.mac, a.mac, IPV6, &icmp6(v6("::"), v6("ff02::16"), 143, &[0; 20]))),
    ];
    for br_netfilter in [true, false] {
        if !support::frames_pass_the_ip_filter(br_netfilter) {
            continue;
        }
        for (what, frame) in &honest {
            let frame = std::slice::from_ref(frame);
            assert_eq!(seen(&mut a, &mut b, frame), frame, "held back: {what}, br_netfilter {br_netfilter}");
        }
    }
}

/// Frames for the bridge's own groups reach the host without the hook that all others pass.
#[test]
fn a_guest_cannot_reach_the_host_with_a_false_address_by_any_door() {
    let Some(node) = alone() else { return };
    let (mut a, _b) = neighbours(&node);
    let host = UdpSocket::bind("0.0.0.0:2000").unwrap();
    host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let bridge = mac_of("bx-default");
    // A host that does not look where an address came from, as many do.
    for interface in ["all", "default", "bx-default", "bxv0000000001-0"] {
        run("sysctl", &format!("-qw net.ipv4.conf.{interface}.rp_filter=0"));
    }
    let to_host = |from: &str, text: &[u8]| ipv4(v4(from), v4("10.88.0.1"), 17, &udp(1000, 2000, text));
    let group = |last: u8| MacAddr([1, 0x80, 0xc2, 0, 0, last]);
    for to in (0..=15).map(group).chain([bridge, BROADCAST]) {
        let spoofed =
            ethernet(to, a.mac, IPV4, &to_host("10.88.0.12", format!("spoofed, to {to}").as_bytes()));
        a.send(&spoofed);
    }
    let direct = ethernet(group(0xe), a.mac, IPV4, &to_host("10.88.0.11", EVIL));
    a.send(&direct);
    let honest = ethernet(bridge, a.mac, IPV4, &to_host("10.88.0.11", b"honest"));
    a.send(&honest);
    let mut buffer = [0; 100];
    let (length, from) = host.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.ip()), (b"honest".as_slice(), IpAddr::from(a.v4)));
}

#[test]
fn frames_for_an_unknown_address_are_not_shown_to_the_neighbour() {
    let Some(node) = alone() else { return };
    let (mut a, mut b) = neighbours(&node);
    let nobody = MacAddr([0x52, 0x54, 0, 0, 0, 0x55]);
    let lost = ethernet(nobody, a.mac, IPV4, &ipv4(a.v4, v4("10.88.0.55"), 17, &udp(1, 2, b"secret")));
    assert!(seen(&mut a, &mut b, &[lost]).is_empty());
}

const READY: &[u8] = b"are you there?";

/// Asks until there is an answer: a link takes its time to come up, and drops what comes before.
fn wait_for(own: &str, beyond: &str) {
    let socket = UdpSocket::bind(own).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let answered = |_: &u32| socket.send_to(READY, beyond).is_ok() && socket.recv_from(&mut [0; 100]).is_ok();
    assert!((0..500).find(answered).is_some(), "{beyond} does not answer");
}

/// A host beyond this one: a thread in another network namespace that answers what it is sent, and tells from whom it came.
struct Outside {
    heard: mpsc::Receiver<(IpAddr, Vec<u8>)>,
    _end: mpsc::Sender<()>,
}

impl Outside {
    /// At 192.0.2.2 and 2001:db8::2; this host is .1 and ::1.
    fn new() -> Self {
        ip("link add uplink type veth peer name beyond");
        ip("address add 192.0.2.1/24 dev uplink");
        ip("address add 2001:db8::1/64 dev uplink nodad");
        ip("link set uplink up");
        ip("route add 169.254.0.0/16 via 192.0.2.2");
        let (tell, heard) = mpsc::channel();
        let (ready, is_ready) = mpsc::channel();
        let (moved, is_moved) = mpsc::channel::<()>();
        let (end, is_end) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            assert!(support::namespace());
            ready.send(nix::unistd::gettid()).unwrap();
            is_moved.recv().unwrap();
            ip("address add 192.0.2.2/24 dev beyond");
            ip("address add 2001:db8::2/64 dev beyond nodad");
            ip("link set beyond up");
            ip("address add 169.254.169.254/32 dev beyond");
            ip("route add 10.88.0.0/16 via 192.0.2.1");
            for address in ["0.0.0.0:7", "[2001:db8::2]:7"] {
                let (socket, tell) = (UdpSocket::bind(address).unwrap(), tell.clone());
                let mut buffer = [0; 100];
                std::thread::spawn(move || {
                    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        if tell.send((from.ip(), buffer[..length].to_vec())).is_err() {
                            return;
                        }
                        socket.send_to(&buffer[..length], from).unwrap();
                    }
                });
            }
            ready.send(nix::unistd::gettid()).unwrap();
            // Knocks at the guest from outside, then says so.
            is_moved.recv().unwrap();
            let knock = UdpSocket::bind("192.0.2.2:0").unwrap();
            knock.send_to(EVIL, "10.88.0.11:2000").unwrap();
            ready.send(nix::unistd::gettid()).unwrap();
            let _ = is_end.recv();
        });
        let thread = is_ready.recv().unwrap();
        ip(&format!("link set beyond netns /proc/{}/task/{thread}/ns/net", std::process::id()));
        moved.send(()).unwrap();
        is_ready.recv().unwrap();
        for (own, beyond) in [("192.0.2.1:0", "192.0.2.2:7"), ("[2001:db8::1]:0", "[2001:db8::2]:7")] {
            wait_for(own, beyond);
        }
        moved.send(()).unwrap();
        is_ready.recv().unwrap();
        Self { heard, _end: end }
    }

    /// Who said `text`, which must be what is heard next.
    fn hears(&self, text: &[u8]) -> IpAddr {
        let mut next = || self.heard.recv_timeout(Duration::from_secs(10)).unwrap();
        let (from, heard) = std::iter::repeat_with(&mut next).find(|(_, heard)| heard != READY).unwrap();
        assert_eq!(String::from_utf8_lossy(&heard), String::from_utf8_lossy(text));
        from
    }
}

/// Spares the host the question where a guest is.
fn known_to_the_host(guest: &Guest, bridge: &str) {
    for address in [IpAddr::from(guest.v4), IpAddr::from(guest.v6)] {
        ip(&format!("neighbour replace {address} lladdr {} dev {bridge}", guest.mac));
    }
}

#[test]
fn a_guest_reaches_the_outside_with_the_hosts_address_and_the_outside_cannot_call_it() {
    let Some(node) = alone() else { return };
    let (mut a, _b) = neighbours(&node);
    known_to_the_host(&a, "bx-default");
    let outside = Outside::new();
    let bridge = mac_of("bx-default");

    let metadata = ipv4(a.v4, v4("169.254.169.254"), 17, &udp(3000, 7, b"the host's credentials, please"));
    a.send(&ethernet(bridge, a.mac, IPV4, &metadata));
    let question = ipv4(a.v4, v4("192.0.2.2"), 17, &udp(3000, 7, b"who am I?"));
    a.send(&ethernet(bridge, a.mac, IPV4, &question));
    assert_eq!(outside.hears(b"who am I?"), IpAddr::from(v4("192.0.2.1")));
    let before = a.receive_until(b"who am I?");
    assert!(!before.iter().any(|frame| contains(frame, EVIL)), "the outside called the guest");

    let question = udp6(a.v6, v6("2001:db8::2"), (3000, 7), b"and who now?");
    a.send(&ethernet(bridge, a.mac, IPV6, &question));
    assert_eq!(outside.hears(b"and who now?"), IpAddr::from(v6("2001:db8::1")));
    a.receive_until(b"and who now?");
}

#[test]
fn a_network_without_nat_stays_at_home() {
    let Some(node) = alone() else { return };
    let (mut a, _b) = neighbours(&node);
    known_to_the_host(&a, "bx-default");
    let mut closed = default_network();
    closed.nat = false;
    node.ensure_network(&closed).unwrap();
    let outside = Outside::new();
    let bridge = mac_of("bx-default");
    let question =
        |text| ethernet(bridge, a.mac, IPV4, &ipv4(a.v4, v4("192.0.2.2"), 17, &udp(3000, 7, text)));
    let (first, second) = (question(b"let me out"), question(b"what now?!"));
    a.send(&first);
    node.ensure_network(&default_network()).unwrap();
    a.send(&second);
    assert_eq!(
        outside.hears(b"what now?!"),
        IpAddr::from(v4("192.0.2.1")),
        "the first would have been heard first"
    );
}

#[test]
fn networks_do_not_see_each_other() {
    let Some(node) = alone() else { return };
    let (mut a, _b) = neighbours(&node);
    node.ensure_network(&network("other", &["10.77.0.1/24", "fd77::1/64"], true)).unwrap();
    let mut stranger = Guest::ensure(&node, &nic(3, "other", &["10.77.0.3"]));
    known_to_the_host(&a, "bx-default");
    ip("neighbour replace 10.77.0.3 lladdr 52:54:00:00:00:03 dev bx-other");
    let bridge = mac_of("bx-default");
    for to in ["10.77.0.3", "10.77.0.1", "169.254.169.254"] {
        let ping = ethernet(bridge, a.mac, IPV4, &ipv4(a.v4, v4(to), 1, &echo(EVIL)));
        a.send(&ping);
    }
    let ping = ethernet(bridge, a.mac, IPV4, &ipv4(a.v4, v4("10.88.0.1"), 1, &echo(b"home?")));
    a.send(&ping);
    let ping6 = |to: &str, text: &[u8]| ethernet(bridge, a.mac, IPV6, &icmp6(a.v6, v6(to), 128, text));
    let (there, here) = (ping6("fd77::1", EVIL), ping6("fd88::1", b"home, too?"));
    a.send(&there);
    a.send(&here);
    let home = a.receive_until(b"home, too?");
    let answered = |frame: &Vec<u8>| contains(frame, EVIL) && (frame[34] == 0 || frame[54] == 129);
    assert!(!home.iter().any(answered), "the gateway of another network answered");
    let ping = ethernet(
        mac_of("bx-other"),
        stranger.mac,
        IPV4,
        &ipv4(stranger.v4, v4("10.77.0.1"), 1, &echo(b"fence")),
    );
    stranger.send(&ping);
    let heard = stranger.receive_until(b"fence");
    assert!(
        !heard.iter().any(|frame| contains(frame, EVIL)),
        "a packet crossed from one network into another"
    );
}

/// Conntrack calls an ICMP error part of the conversation that it quotes, whoever sends it.
#[test]
fn a_guest_cannot_meddle_in_the_conversations_of_another_network() {
    let Some(node) = alone() else { return };
    let (mut a, _b) = neighbours(&node);
    node.ensure_network(&network("other", &["10.77.0.1/24"], true)).unwrap();
    let mut victim = Guest::ensure(&node, &nic(3, "other", &["10.77.0.3"]));
    ip("neighbour replace 10.77.0.3 lladdr 52:54:00:00:00:03 dev bx-other");
    let outside = Outside::new();
    let gateway = mac_of("bx-other");
    let talk = |text| {
        ethernet(gateway, victim.mac, IPV4, &ipv4(victim.v4, v4("192.0.2.2"), 17, &udp(3000, 7, text)))
    };
    let (first, second) = (talk(b"first"), talk(b"second"));
    victim.send(&first);
    outside.hears(b"first");
    victim.receive_until(b"first");
    // As it is on the uplink, with the host's address and the port that the masquerade left alone.
    let quoted = ipv4(v4("192.0.2.1"), v4("192.0.2.2"), 17, &udp(3000, 7, EVIL));
    let unreachable = ipv4(a.v4, v4("192.0.2.1"), 1, &unreachable(&quoted));
    a.send(&ethernet(mac_of("bx-default"), a.mac, IPV4, &unreachable));
    victim.send(&second);
    let heard = victim.receive_until(b"second");
    assert!(!heard.iter().any(|frame| contains(frame, EVIL)), "an error from another network was delivered");
}

fn any_firewall() -> impl Strategy<Value = Firewall> {
    let nic =
        (any::<[u8; 5]>(), proptest::collection::btree_set(any::<u16>(), 0..8)).prop_map(|(mac, hosts)| {
            let [a, b, c, d, e] = mac;
            let address = |host: u16| match host % 2 {
                0 => IpAddr::from(Ipv4Addr::from_bits(0x0a58_0000 | u32::from(host))),
                _ => IpAddr::from(Ipv6Addr::from_bits((0xfd88_u128 << 112) | u128::from(host))),
            };
            NicRules { mac: MacAddr([2, a, b, c, d, e]), addresses: hosts.into_iter().map(address).collect() }
        });
    let id = "bxv[0-9a-z]{10}-[0-9]".prop_map(|text| text.parse::<NicId>().unwrap());
    let network = (any::<bool>(), any::<u8>()).prop_map(|(outbound, net)| {
        let gateways = [IpAddr::from([10, net, 0, 1]), IpAddr::from([0xfd00, net.into(), 0, 0, 0, 0, 0, 1])];
        NetworkRules { outbound, gateways: gateways.into() }
    });
    let networks = proptest::collection::btree_map("bx-[a-z][0-9a-z-]{0,11}", network, 0..5);
    (networks, proptest::collection::btree_map(id, nic, 0..20))
        .prop_map(|(networks, nics)| Firewall { networks, nics })
}

#[test]
fn any_packet_filter_is_read_back_as_it_was_written() {
    if !support::namespace() {
        return;
    }
    // The first knows what it wrote and writes differences; the second knows nothing.
    let filter = Filter::connect().unwrap();
    proptest!(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() }, |(first in any_firewall(), wanted in any_firewall())| {
        filter.apply(&first).unwrap();
        filter.apply(&wanted).unwrap();
        prop_assert_eq!(filter.known(), Some(wanted.clone()));
        prop_assert_eq!(filter.read().unwrap(), wanted.clone());
        let by_difference = nft("list ruleset");
        Filter::connect().unwrap().apply(&wanted).unwrap();
        prop_assert_eq!(sorted(&nft("list ruleset")), sorted(&by_difference));
        prop_assert_eq!(filter.known(), None, "somebody else wrote");
    });
    filter.apply(&Firewall::default()).unwrap();
    assert_eq!(nft("list ruleset"), "");
}

/// The words of a listing: the kernel keeps the elements of a set in no order.
fn sorted(listing: &str) -> Vec<String> {
    let mut words: Vec<String> =
        listing.split([' ', ',', '\n', '\t']).map(str::to_owned).filter(|w| !w.is_empty()).collect();
    words.sort();
    words
}
