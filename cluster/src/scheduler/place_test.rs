//! Placements against an oracle that looks at everything, on small clusters of every kind.

use std::collections::BTreeMap;

use blixard_api::VmId;
use blixard_api::placement::{
    AntiAffinity, OnNodeLoss, Placement, PreemptionPolicy, Scope, Strategy, Toleration,
};
use proptest::prelude::*;

use super::super::model::{NodeInfo, Placed, Size};
use super::*;

fn size(memory_mib: u64) -> Size {
    Size { cpu_milli: memory_mib, memory_mib, disk_mib: memory_mib }
}

fn node(id: NodeId, memory: u64) -> NodeInfo {
    NodeInfo { id, name: format!("n{id}"), room: Some(size(memory)), up: true, ..NodeInfo::default() }
}

fn vm(number: u128, memory: u64, placement: &Placement) -> Placed {
    Placed {
        id: VmId::from_u128(number),
        project: "p".into(),
        size: size(memory),
        accelerators: placement.accelerators.clone(),
        groups: placement.anti_affinity.clone(),
        priority: placement.priority,
        stays: placement.on_node_loss == OnNodeLoss::Wait,
    }
}

fn request(memory: u64, placement: &Placement) -> Request<'_> {
    let size = size(memory);
    Request { project: "p", size, placement, image: None, data: Data::Anywhere, avoid: &[], untold: false }
}

fn chosen(view: &View, memory: u64, placement: &Placement) -> Option<NodeId> {
    match place(view, &request(memory, placement)) {
        Decision::Place { node, .. } => Some(node),
        Decision::Refused(_) => None,
    }
}

#[test]
fn packing_fills_the_fullest_node_and_spreading_the_emptiest() {
    let mut view = View::default();
    let plain = Placement::default();
    for id in 1..=3 {
        view.set_node(node(id, 100));
    }
    view.put(2, vm(1, 30, &plain));
    view.put(3, vm(2, 60, &plain));
    let pack = Placement { strategy: Strategy::Pack, ..Placement::default() };
    assert_eq!(chosen(&view, 40, &pack), Some(3));
    assert_eq!(chosen(&view, 41, &pack), Some(2), "no room on the fullest");
    assert_eq!(chosen(&view, 40, &plain), Some(1));
    assert_eq!(chosen(&view, 101, &plain), None);
}

#[test]
fn a_node_that_has_not_told_what_it_has_takes_nothing_and_nobody_leaves_it_for_others() {
    let mut view = View::default();
    view.set_node(node(1, 100));
    view.set_node(NodeInfo { room: None, ..node(2, 0) });
    let urgent = Placement { priority: 50, ..Placement::default() };
    view.put(2, vm(1, 10, &Placement::default()));
    assert_eq!(chosen(&view, 100, &urgent), Some(1));
    view.put(1, vm(2, 100, &urgent));
    assert_eq!(chosen(&view, 5, &urgent), None);
    let lenient = Request { untold: true, ..request(5, &urgent) };
    assert_eq!(place(&view, &lenient), Decision::Place { node: 2, victims: vec![] });
}

#[test]
fn members_of_a_group_keep_apart_by_the_wish_of_either() {
    let mut view = View::default();
    for (id, zone) in [(1, "a"), (2, "a"), (3, "b")] {
        let labels = BTreeMap::from([("zone".to_owned(), zone.to_owned())]);
        view.set_node(NodeInfo { labels, ..node(id, 100) });
    }
    let member = |scope, soft| Placement {
        anti_affinity: vec![AntiAffinity { group: "g".into(), scope, soft }],
        strategy: Strategy::Pack,
        ..Placement::default()
    };
    view.put(1, vm(1, 10, &member(Scope::Zone, false)));
    assert_eq!(chosen(&view, 10, &member(Scope::Node, true)), Some(3), "the member that is there insists");
    view.take(1, VmId::from_u128(1));
    view.put(1, vm(2, 10, &member(Scope::Node, true)));
    assert_eq!(chosen(&view, 10, &member(Scope::Zone, false)), Some(3), "the newcomer insists");
    assert_eq!(chosen(&view, 10, &member(Scope::Node, true)), Some(2), "preferred only");
    let mut other = request(10, &Placement::default()).placement.clone();
    other.anti_affinity = member(Scope::Zone, false).anti_affinity;
    let elsewhere = Request { project: "q", ..request(10, &other) };
    assert!(refuses(&view, &elsewhere, 1).is_none(), "groups are per project");
}

#[test]
fn the_nearest_node_to_the_data_is_preferred_and_data_that_cannot_move_decides() {
    let mut view = View::default();
    for (id, rack) in [(1, "a"), (2, "b"), (3, "b")] {
        let labels = BTreeMap::from([("rack".to_owned(), rack.to_owned())]);
        view.set_node(NodeInfo { labels, ..node(id, 100) });
    }
    let plain = Placement::default();
    view.put(3, vm(1, 95, &plain));
    let near = Request { data: Data::Near(&[3]), ..request(10, &plain) };
    assert_eq!(place(&view, &near), Decision::Place { node: 2, victims: vec![] }, "the same rack");
    let only = Request { data: Data::Only(&[3]), ..request(10, &plain) };
    let Decision::Refused(why) = place(&view, &only) else { panic!() };
    assert_eq!(
        why.refused,
        BTreeMap::from([(Reason::Data, 2), (Reason::Room(super::super::Resource::Cpu), 1)])
    );
}

#[test]
fn victims_are_the_least_important_or_the_cheapest_and_no_more_than_needed() {
    let mut view = View::default();
    let with = |priority, policy| {
        let mut placement = Placement { priority, ..Placement::default() };
        placement.preemption.policy = policy;
        placement
    };
    view.set_node(node(1, 6400));
    view.set_node(node(2, 6400));
    view.put(1, vm(1, 3200, &with(100, PreemptionPolicy::Never)));
    view.put(1, vm(2, 3200, &with(900, PreemptionPolicy::Never)));
    view.put(2, vm(3, 5760, &with(50, PreemptionPolicy::Never)));
    view.put(2, vm(4, 640, &with(300, PreemptionPolicy::Never)));
    let decide = |policy| place(&view, &request(640, &with(500, policy)));
    let victims = |numbers: &[u128]| numbers.iter().map(|n| VmId::from_u128(*n)).collect::<Vec<_>>();
    assert!(matches!(decide(PreemptionPolicy::Never), Decision::Refused(_)));
    assert_eq!(decide(PreemptionPolicy::LowerPriority), Decision::Place { node: 2, victims: victims(&[3]) });
    assert_eq!(decide(PreemptionPolicy::CostAware), Decision::Place { node: 2, victims: victims(&[4]) });
    assert!(matches!(
        place(&view, &request(640, &with(50, PreemptionPolicy::LowerPriority))),
        Decision::Refused(_)
    ));
}

/// A node of a random kind.
fn nodes() -> impl Strategy2<Value = Vec<NodeInfo>> {
    let one =
        (20u64..120, 0u8..3, 0u8..3, 0u8..4, 0u32..4, prop::bool::weighted(0.9), prop::bool::weighted(0.1));
    prop::collection::vec(one, 1..9).prop_map(|nodes| {
        let made =
            nodes.into_iter().enumerate().map(|(at, (memory, zone, rack, taint, cost, up, cordoned))| {
                let label = |key: &str, value: u8| (key.to_owned(), value.to_string());
                let mut labels = BTreeMap::from([label("rack", rack)]);
                labels.extend((zone > 0).then(|| label("zone", zone)));
                let taints = match taint {
                    1 => vec!["gpu:no-schedule".parse().unwrap()],
                    2 => vec!["old:prefer-no-schedule".parse().unwrap()],
                    _ => vec![],
                };
                let id = NodeId::try_from(at).unwrap() * 7 % 11 + 1;
                let accelerators = BTreeMap::from([("gpu".to_owned(), u32::from(rack))]);
                NodeInfo { labels, taints, cost, up, cordoned, accelerators, ..node(id, memory) }
            });
        made.collect()
    })
}

use proptest::strategy::Strategy as Strategy2;

fn placements() -> impl Strategy2<Value = Placement> {
    let constraint =
        prop::sample::select(vec!["zone=1", "zone!=1", "zone in (1,2)", "zone", "rack=0", "node=n1"]);
    let group = ("[gh]", 0usize..4, any::<bool>());
    let policy = prop::sample::select(vec![
        PreemptionPolicy::Never,
        PreemptionPolicy::LowerPriority,
        PreemptionPolicy::CostAware,
    ]);
    let lists =
        (prop::collection::vec(constraint, 0..2), prop::option::weighted(0.3, group), any::<bool>(), 0u32..2);
    (lists, 0u16..4, policy, any::<bool>(), prop::bool::weighted(0.3)).prop_map(
        |((constraints, group, tolerates, gpus), priority, policy, pack, waits)| {
            let mut placement = Placement {
                constraints: constraints.into_iter().map(|text| text.parse().unwrap()).collect(),
                anti_affinity: group
                    .into_iter()
                    .map(|(group, scope, soft)| AntiAffinity { group, scope: Scope::ALL[scope], soft })
                    .collect(),
                priority: priority * 250,
                on_node_loss: if waits { OnNodeLoss::Wait } else { OnNodeLoss::Restart },
                strategy: if pack { Strategy::Pack } else { Strategy::Spread },
                ..Placement::default()
            };
            if tolerates {
                placement.tolerations = vec![Toleration { key: "gpu".into(), value: None }];
            }
            if gpus > 0 {
                placement.accelerators = BTreeMap::from([("gpu".to_owned(), gpus)]);
            }
            placement.preemption.policy = policy;
            placement
        },
    )
}

/// The cluster as plain lists, and what is possible there, written as it is said.
struct Oracle {
    nodes: Vec<NodeInfo>,
    vms: Vec<(NodeId, Placed)>,
}

impl Oracle {
    fn on(&self, node: NodeId) -> impl Iterator<Item = &Placed> {
        self.vms.iter().filter(move |(on, _)| *on == node).map(|(_, vm)| vm)
    }

    fn domain(node: &NodeInfo, scope: Scope) -> String {
        match scope {
            Scope::Node => node.id.to_string(),
            _ => node.labels.get(scope.name()).cloned().unwrap_or_default(),
        }
    }

    fn possible(&self, node: &NodeInfo, memory: u64, placement: &Placement, without: &[VmId]) -> bool {
        let here = || self.on(node.id).filter(|vm| !without.contains(&vm.id));
        let used: u64 = here().map(|vm| vm.size.memory_mib).sum();
        let gpus = |accelerators: &BTreeMap<String, u32>| accelerators.get("gpu").copied().unwrap_or(0);
        let used_gpus: u32 = here().map(|vm| gpus(&vm.accelerators)).sum();
        let tolerated = |taint: &blixard_api::placement::Taint| {
            taint.key != "gpu" || placement.tolerations.iter().any(|t| t.covers(taint))
        };
        let apart = placement.anti_affinity.iter().all(|ours| {
            self.nodes.iter().all(|other| {
                self.on(other.id).filter(|vm| !without.contains(&vm.id)).all(|vm| {
                    vm.groups.iter().filter(|theirs| theirs.group == ours.group).all(|theirs| {
                        let same = |scope| Self::domain(node, scope) == Self::domain(other, scope);
                        (ours.soft || !same(ours.scope)) && (theirs.soft || !same(theirs.scope))
                    })
                })
            })
        });
        node.up
            && !node.cordoned
            && placement.constraints.iter().all(|c| c.holds(node.label(&c.key)))
            && node.taints.iter().all(tolerated)
            && apart
            && (gpus(&placement.accelerators) == 0
                || used_gpus + gpus(&placement.accelerators) <= gpus(&node.accelerators))
            && used + memory <= node.room.unwrap().memory_mib
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn every_decision_is_possible_best_explained_and_takes_no_equal_or_higher_priority(
        nodes in nodes(),
        wanted in prop::collection::vec((placements(), 5u64..60, prop::bool::weighted(0.2)), 1..30),
    ) {
        let mut view = View::default();
        nodes.iter().for_each(|node| view.set_node(node.clone()));
        let mut oracle = Oracle { nodes, vms: vec![] };
        for (number, (placement, memory, leave)) in wanted.into_iter().enumerate() {
            let asked = request(memory, &placement);
            let decision = place(&view, &asked);
            prop_assert_eq!(&decision, &place(&view.clone(), &asked), "the same again");
            let possible: Vec<NodeId> = oracle
                .nodes
                .iter()
                .filter(|node| oracle.possible(node, memory, &placement, &[]))
                .map(|node| node.id)
                .collect();
            let why = explain(&view, &asked);
            prop_assert_eq!(why.possible, possible.len());
            prop_assert_eq!(why.nodes, why.possible + why.refused.values().sum::<usize>());
            match &decision {
                Decision::Place { node, victims } if victims.is_empty() => {
                    prop_assert!(possible.contains(node));
                    let search = Search::new(&view, &asked, Weights::DEFAULT);
                    let best = possible.iter().map(|id| (search.score(view.node(*id).unwrap()), Reverse(*id))).max();
                    prop_assert_eq!(best.map(|(_, Reverse(id))| id), Some(*node), "none is better");
                }
                Decision::Place { node, victims } => {
                    prop_assert!(possible.is_empty() && placement.preemption.policy != PreemptionPolicy::Never);
                    let info = oracle.nodes.iter().find(|n| n.id == *node).unwrap();
                    prop_assert!(oracle.possible(info, memory, &placement, victims), "they are enough");
                    for victim in victims {
                        let vm = oracle.on(*node).find(|vm| vm.id == *victim).unwrap();
                        prop_assert!(vm.priority < placement.priority && !vm.stays);
                        let fewer: Vec<VmId> = victims.iter().copied().filter(|v| v != victim).collect();
                        prop_assert!(!oracle.possible(info, memory, &placement, &fewer), "each is needed");
                    }
                }
                Decision::Refused(said) => {
                    prop_assert!(possible.is_empty());
                    prop_assert_eq!(said, &why);
                    // Nor would it help to stop all that may be stopped.
                    if placement.preemption.policy != PreemptionPolicy::Never {
                        let all: Vec<VmId> =
                            oracle.vms.iter().filter(|(_, vm)| vm.priority < placement.priority && !vm.stays).map(|(_, vm)| vm.id).collect();
                        for node in &oracle.nodes {
                            let here: Vec<VmId> = oracle.on(node.id).map(|vm| vm.id).filter(|id| all.contains(id)).collect();
                            let apart = neighbours_allow(&view, &asked, node.id);
                            prop_assert!(!apart || !oracle.possible(node, memory, &placement, &here));
                        }
                    }
                }
            }
            if let Decision::Place { node, victims } = decision {
                for victim in victims {
                    view.take(node, victim);
                    oracle.vms.retain(|(_, vm)| vm.id != victim);
                }
                let placed = vm(u128::try_from(number).unwrap() + 1, memory, &placement);
                view.put(node, placed.clone());
                oracle.vms.push((node, placed));
            }
            if leave && !oracle.vms.is_empty() {
                let (node, gone) = oracle.vms.remove(number % oracle.vms.len());
                view.take(node, gone.id);
            }
        }
    }
}

/// Members of groups are never victims for being too near: that is said in the README.
fn neighbours_allow(view: &View, request: &Request<'_>, node: NodeId) -> bool {
    refuses(view, request, node) != Some(Reason::AntiAffinity)
}

#[test]
fn a_snapshot_does_not_see_what_comes_after_it() {
    let mut view = View::default();
    view.set_node(node(1, 100));
    let snapshot = view.clone();
    view.put(1, vm(1, 100, &Placement::default()));
    assert_eq!(chosen(&view, 10, &Placement::default()), None);
    assert_eq!(chosen(&snapshot, 10, &Placement::default()), Some(1));
    view.remove_node(1);
    assert_eq!(view.node_count(), 0);
}
