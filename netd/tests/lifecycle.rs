//! Networks and nics come, are repaired and go, in a network namespace of the test's own.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout))]

mod support;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use blixard_netd::Node;
use blixard_netd::error::ChangeError;
use blixard_netd::tap::TapError;
use blixard_netd_api::{Inventory, NicSpec, Problem, ProblemKind};
use support::{
    ARP, Guest, IPV4, alone, arp, contains, default_network, echo, ethernet, ip, ipv4, network, nft, nic,
    run, udp, when_free,
};

fn bridge_mac() -> blixard_vmm_api::config::MacAddr {
    let shown = ip("-br link show bx-default");
    shown.split_whitespace().nth(2).unwrap().parse().unwrap()
}

/// The guest asks its gateway for an echo, by ARP first, and gets both answers.
fn gateway_answers(guest: &mut Guest) {
    let gateway = "10.88.0.1".parse().unwrap();
    let asked = arp(1, (guest.mac, guest.v4), (support::BROADCAST, gateway));
    let broadcast = ethernet(support::BROADCAST, guest.mac, ARP, &asked);
    guest.send(&broadcast);
    let mac =
        guest.receive(|frame| (frame[12..14] == [8, 6] && frame[21] == 2).then(|| frame[22..28].to_vec()));
    assert_eq!(mac, bridge_mac().0);
    let ping = ethernet(bridge_mac(), guest.mac, IPV4, &ipv4(guest.v4, gateway, 1, &echo(b"anybody?")));
    guest.send(&ping);
    guest.receive(|frame| (contains(frame, b"anybody?") && frame[34] == 0).then_some(()));
}

fn passes(from: &mut Guest, to: &mut Guest, text: &[u8]) {
    let packet = ipv4(from.v4, to.v4, 17, &udp(1000, 2000, text));
    from.send(&ethernet(to.mac, from.mac, IPV4, &packet));
    to.receive_until(text);
}

fn refused(result: Result<impl Sized, ChangeError>) -> Problem {
    Problem::from(result.err().unwrap())
}

fn two_nics() -> (NicSpec, NicSpec) {
    (nic(1, "default", &["10.88.0.11", "fd88::11"]), nic(2, "default", &["10.88.0.12", "fd88::12"]))
}

/// What a host without networks of ours looks like.
fn assert_untouched() {
    assert!(!ip("-o link").contains("bx"), "{}", ip("-o link"));
    assert_eq!(nft("list ruleset"), "");
}

#[test]
fn what_is_ensured_twice_is_there_once_and_what_is_removed_twice_leaves_nothing() {
    let Some(node) = alone() else { return };
    let (a, b) = two_nics();
    for _ in 0..2 {
        node.ensure_network(&default_network()).unwrap();
        assert!(node.ensure_nic(&a, false).unwrap().is_none());
        node.ensure_nic(&b, false).unwrap();
        let nics = vec![(a.id.clone(), Some("default".into())), (b.id.clone(), Some("default".into()))];
        assert_eq!(node.list().unwrap(), Inventory { networks: vec!["default".into()], nics });
    }
    let problem = refused(node.remove_network("default"));
    assert_eq!(problem.kind, ProblemKind::Busy);
    for _ in 0..2 {
        node.remove_nic(&a.id).unwrap();
        node.remove_nic(&b.id).unwrap();
        node.remove_network("default").unwrap();
        assert_eq!(node.list().unwrap(), Inventory::default());
        assert_untouched();
    }
}

#[test]
fn a_new_nic_reaches_its_gateway_and_its_neighbour() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    let (a, b) = two_nics();
    let (mut a, mut b) = (Guest::ensure(&node, &a), Guest::ensure(&node, &b));
    gateway_answers(&mut a);
    passes(&mut a, &mut b, b"first");
    passes(&mut b, &mut a, b"second");
}

#[test]
fn whatever_is_broken_by_hand_is_repaired_while_the_taps_stay_open() {
    let Some(node) = alone() else { return };
    let (spec_a, spec_b) = two_nics();
    node.ensure_network(&default_network()).unwrap();
    let (mut a, mut b) = (Guest::ensure(&node, &spec_a), Guest::ensure(&node, &spec_b));
    let (tap, table) = (spec_a.id.interface(), "blixard");
    let broken: [&dyn Fn(); 9] = [
        &|| drop(ip("link delete bx-default")),
        &|| drop(ip("address flush dev bx-default")),
        &|| drop(ip("address add 10.99.0.1/24 dev bx-default")),
        &|| drop(ip(&format!("link set {tap} nomaster"))),
        &|| drop(ip(&format!("link set {tap} down"))),
        &|| drop(ip("link set bx-default down address 02:00:00:00:00:99 mtu 1400")),
        &|| drop(run("bridge", &format!("link set dev {tap} learning on flood on"))),
        &|| drop(nft(&format!("flush table bridge {table}"))),
        &|| drop(nft("delete table inet blixard")),
    ];
    let picture = || {
        let filter = nft("list ruleset");
        let ports = run("bridge", "-d link show");
        (ip("-br address show bx-default"), ip("link show bx-default"), ports, filter)
    };
    let plain = |(addresses, link, ports, filter): (String, String, String, String)| {
        // Numbers of interfaces differ after one was made anew.
        let text = |t: String| t.split_once(": ").map_or(t.clone(), |(_, rest)| rest.to_owned());
        let ports: Vec<String> = ports.lines().map(|l| text(l.to_owned())).collect();
        (addresses, text(link), ports, filter)
    };
    let whole = plain(picture());
    for (step, break_it) in broken.iter().enumerate() {
        break_it();
        assert_ne!(plain(picture_or_nothing(&picture)), whole, "step {step} breaks something");
        repair(&node, &spec_a, &spec_b);
        // The kernel shows a bridge as up a little after it is.
        let until = Instant::now() + Duration::from_secs(10);
        while plain(picture()) != whole && Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(plain(picture()), whole, "step {step}");
        gateway_answers(&mut a);
        passes(&mut a, &mut b, format!("text of step {step}").as_bytes());
    }
}

type Picture = (String, String, String, String);

/// A bridge that is gone cannot be shown.
fn picture_or_nothing(picture: &dyn Fn() -> Picture) -> Picture {
    if ip("-o link").contains("bx-default") { picture() } else { Picture::default() }
}

fn repair(node: &Node, a: &NicSpec, b: &NicSpec) {
    node.ensure_network(&default_network()).unwrap();
    node.ensure_nic(a, false).unwrap();
    node.ensure_nic(b, false).unwrap();
}

#[test]
fn a_tap_is_given_to_one_holder_at_a_time_and_outlives_it() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    let (spec, _) = two_nics();
    let first = node.ensure_nic(&spec, true).unwrap().unwrap();
    assert_eq!(refused(node.ensure_nic(&spec, true)).kind, ProblemKind::Busy);
    node.ensure_nic(&spec, false).unwrap();
    let held = Guest::new(&spec, first.as_fd().try_clone_to_owned().unwrap());
    drop(first);
    assert_eq!(refused(node.ensure_nic(&spec, true)).kind, ProblemKind::Busy, "a copy still holds it");
    drop(held);
    let busy = |error: &ChangeError| matches!(error, ChangeError::Tap(TapError::Busy(_)));
    let tap = when_free(|| node.ensure_nic(&spec, true), busy).unwrap();
    gateway_answers(&mut Guest::new(&spec, tap));
    node.remove_nic(&spec.id).unwrap();
    assert!(!ip("-o link").contains(spec.id.interface()), "removing does not wait for the holder");
}

#[test]
fn a_tap_belongs_to_the_user_of_netd() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    let (spec, _) = two_nics();
    node.ensure_nic(&spec, false).unwrap();
    let shown = ip(&format!("-d link show {}", spec.id));
    assert!(
        shown.contains("user root") && shown.contains("vnet_hdr on") && shown.contains("persist on"),
        "{shown}"
    );
}

#[test]
fn a_nic_may_change_its_addresses_and_its_network() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    node.ensure_network(&network("other", &["10.77.0.1/24"], false)).unwrap();
    let (mut spec, b) = two_nics();
    let mut guest = Guest::ensure(&node, &spec);
    let mut other = Guest::ensure(&node, &b);
    spec.addresses = vec!["10.88.0.99".parse().unwrap()];
    spec.mac = "52:54:00:00:00:99".parse().unwrap();
    node.ensure_nic(&spec, false).unwrap();
    (guest.v4, guest.mac) = ("10.88.0.99".parse().unwrap(), spec.mac);
    gateway_answers(&mut guest);
    passes(&mut other, &mut guest, b"to the new address");
    let entries = run("bridge", &format!("fdb show brport {}", spec.id));
    assert!(entries.contains("52:54:00:00:00:99") && !entries.contains("52:54:00:00:00:01"), "{entries}");
    spec.network = "other".into();
    spec.addresses = vec!["10.77.0.9".parse().unwrap()];
    node.ensure_nic(&spec, false).unwrap();
    assert!(node.list().unwrap().nics.contains(&(spec.id.clone(), Some("other".into()))));
}

#[test]
fn a_subnet_that_the_host_uses_already_is_refused_and_nothing_is_made() {
    let Some(node) = alone() else { return };
    ip("link add uplink type bridge");
    ip("address add 10.88.3.4/24 dev uplink");
    let problem = refused(node.ensure_network(&default_network()));
    assert_eq!(problem.kind, ProblemKind::Conflict);
    assert!(problem.message.contains("10.88.3.4/24 of the interface uplink"), "{problem}");
    assert_untouched();
    node.ensure_network(&network("a", &["10.77.0.1/24"], true)).unwrap();
    let problem = refused(node.ensure_network(&network("b", &["10.77.0.129/25"], true)));
    assert_eq!(problem.kind, ProblemKind::Conflict);
}

#[test]
fn an_interface_of_our_name_that_is_not_ours_is_left_alone() {
    let Some(node) = alone() else { return };
    ip("link add bx-default type veth peer name other-end");
    assert_eq!(refused(node.ensure_network(&default_network())).kind, ProblemKind::Conflict);
    assert_eq!(refused(node.remove_network("default")).kind, ProblemKind::Conflict);
    node.ensure_network(&network("a", &["10.77.0.1/24"], true)).unwrap();
    let spec = nic(1, "a", &["10.77.0.2"]);
    ip(&format!("link add {} type bridge", spec.id));
    assert_eq!(refused(node.ensure_nic(&spec, true)).kind, ProblemKind::Conflict);
    assert_eq!(refused(node.remove_nic(&spec.id)).kind, ProblemKind::Conflict);
    ip(&format!("link delete {}", spec.id));
    ip(&format!("tuntap add {} mode tun", spec.id));
    assert_eq!(refused(node.ensure_nic(&spec, true)).kind, ProblemKind::Conflict);
    assert_eq!(node.list().unwrap().networks, ["a"]);
}

#[test]
fn a_nic_that_cannot_be_is_refused_with_its_field_and_leaves_nothing() {
    let Some(node) = alone() else { return };
    let good = nic(1, "default", &["10.88.0.11"]);
    assert_eq!(refused(node.ensure_nic(&good, true)).kind, ProblemKind::NoNetwork);
    node.ensure_network(&default_network()).unwrap();
    let filter = nft("list ruleset");
    let check = |field: &str, change: &dyn Fn(&mut NicSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        let problem = refused(node.ensure_nic(&spec, true));
        assert_eq!(problem.kind, ProblemKind::Invalid, "{problem}");
        assert!(problem.message.starts_with(field), "{problem}");
        assert_eq!(nft("list ruleset"), filter);
    };
    let address = |text: &'static str| move |spec: &mut NicSpec| spec.addresses.push(text.parse().unwrap());
    check("mac", &|spec| spec.mac.0[0] |= 1);
    check("mac", &|spec| spec.mac.0 = [0; 6]);
    check("name", &|spec| spec.network = "../x".into());
    check("addresses", &address("10.89.0.1"));
    check("addresses", &address("fd89::1"));
    check("addresses", &address("10.88.0.1"));
    check("addresses", &address("10.88.0.0"));
    check("addresses", &address("10.88.255.255"));
    check("addresses", &address("10.88.0.11"));
    check("addresses", &|spec| {
        spec.addresses = (20..29).map(|n| format!("10.88.0.{n}").parse().unwrap()).collect()
    });
    assert!(node.list().unwrap().nics.is_empty());
}

#[test]
fn two_nics_with_the_same_address_are_refused() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    let (a, b) = two_nics();
    node.ensure_nic(&a, false).unwrap();
    let changes: [fn(&mut NicSpec, &NicSpec); 2] =
        [|b, a| b.mac = a.mac, |b, a| b.addresses.push(a.addresses[1])];
    for change in changes {
        let mut double = b.clone();
        change(&mut double, &a);
        let problem = refused(node.ensure_nic(&double, true));
        assert_eq!(problem.kind, ProblemKind::Conflict);
        assert!(problem.message.contains(a.id.interface()), "{problem}");
    }
    node.remove_nic(&a.id).unwrap();
    let mut heir = b;
    heir.addresses = a.addresses;
    node.ensure_nic(&heir, false).unwrap();
}

#[test]
fn a_host_that_has_its_address_from_a_router_keeps_it_when_it_begins_to_forward() {
    let Some(node) = alone() else { return };
    ip("link add uplink type veth peer name router");
    ip("link add quiet type veth peer name other-end");
    let switch = |name: &str| format!("/proc/sys/net/ipv6/conf/{name}");
    let read = |name: &str| std::fs::read_to_string(switch(name)).unwrap().trim().to_owned();
    std::fs::write(switch("all/forwarding"), "0").unwrap();
    for (interface, accepts) in [("uplink", "1"), ("quiet", "0"), ("default", "1")] {
        std::fs::write(switch(&format!("{interface}/accept_ra")), accepts).unwrap();
    }
    node.ensure_network(&network("a", &["fd77::1/64"], false)).unwrap();
    assert_eq!(read("all/forwarding"), "0", "a network that stays at home needs no forwarding");
    node.ensure_network(&network("a", &["fd77::1/64"], true)).unwrap();
    let after = ["all/forwarding", "uplink/accept_ra", "quiet/accept_ra", "default/accept_ra"].map(read);
    assert_eq!(after, ["1", "2", "0", "1"]);
}

#[test]
fn a_network_that_cannot_be_is_refused_with_its_field_and_leaves_nothing() {
    let Some(node) = alone() else { return };
    let subnets = [
        "10.88.0.0/16",
        "10.88.255.255/16",
        "169.254.1.1/16",
        "0.1.2.3/8",
        "240.0.0.1/8",
        "127.0.0.1/8",
        "224.0.0.1/8",
        "fe80::1/64",
        "fd88::/64",
        "::ffff:10.0.0.1/112",
        "ff02::1/64",
        "10.88.0.1/31",
    ];
    for text in subnets {
        let problem = refused(node.ensure_network(&network("a", &[text], true)));
        assert_eq!(problem.kind, ProblemKind::Invalid, "{problem}");
        assert!(problem.message.starts_with("subnets"), "{problem}");
    }
    for name in ["", "../x", "A", "a b", "thirteen-long"] {
        assert_eq!(
            refused(node.ensure_network(&network(name, &["10.77.0.1/24"], true))).kind,
            ProblemKind::Invalid
        );
        assert_eq!(refused(node.remove_network(name)).kind, ProblemKind::Invalid);
    }
    assert_untouched();
}

#[test]
fn the_address_of_a_nic_whose_tap_was_removed_by_hand_is_free_again() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    let (gone, mut heir) = two_nics();
    node.ensure_nic(&gone, false).unwrap();
    ip(&format!("link delete {}", gone.id));
    heir.addresses = gone.addresses;
    node.ensure_nic(&heir, false).unwrap();
    assert!(!nft("list table bridge blixard").contains(gone.id.interface()));
}

#[test]
fn a_nic_waits_for_a_network_that_lost_its_address() {
    let Some(node) = alone() else { return };
    node.ensure_network(&default_network()).unwrap();
    ip("address flush dev bx-default");
    let (spec, _) = two_nics();
    let problem = refused(node.ensure_nic(&spec, false));
    assert_eq!(problem.kind, ProblemKind::Kernel, "trying again helps: {problem}");
    node.ensure_network(&default_network()).unwrap();
    node.ensure_nic(&spec, false).unwrap();
    let mut taken = default_network();
    taken.subnets[0].gateway = spec.addresses[0];
    assert_eq!(refused(node.ensure_network(&taken)).kind, ProblemKind::Conflict);
}
