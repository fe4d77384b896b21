//! How many placements per second the scheduler answers, and how long one takes: `place NODES VMS PLACEMENTS`. The cluster is
//! filled with VMs of mixed sizes, groups and priorities; then each placement is answered and applied, and an old VM
//! leaves, so that the fullness stays. Prints one JSON object; times are in nanoseconds.
#![expect(clippy::print_stdout, reason = "a program for the terminal")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blixard_api::VmId;
use blixard_api::placement::{AntiAffinity, Placement, PreemptionPolicy, Scope, Strategy};
use blixard_node::scheduler::{Data, Decision, NodeInfo, Placed, Request, Size, View, place};

/// Numbers that look random and are the same each time (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

fn node(id: u64) -> NodeInfo {
    let label = |key: &str, value: u64| (key.to_owned(), value.to_string());
    let disk = if id.is_multiple_of(3) { "ssd" } else { "hdd" };
    let mut labels =
        BTreeMap::from([label("rack", id / 40), label("zone", id / 400), label("datacenter", id / 1000)]);
    labels.insert("disk".into(), disk.into());
    NodeInfo {
        id,
        name: format!("n{id}"),
        room: Some(Size { cpu_milli: 64_000 * 4, memory_mib: 256 << 10, disk_mib: 16 << 20 }),
        labels,
        taints: if id.is_multiple_of(50) {
            "gpu:no-schedule".parse().into_iter().collect()
        } else {
            Vec::new()
        },
        accelerators: BTreeMap::from([("gpu".to_owned(), if id.is_multiple_of(50) { 8 } else { 0 })]),
        up: true,
        cost: u32::try_from(id % 5).unwrap_or(0),
        ..NodeInfo::default()
    }
}

/// A request of one of the usual kinds.
fn wanted(numbers: &mut Numbers) -> Result<(Size, Placement)> {
    // 256 MiB to 8 GiB, mostly small: together about 4.6 GiB, of which 50 fill a node to nine tenths.
    let memory_mib = 256 << [0, 2, 4, 4, 5, 5].get(usize::try_from(numbers.below(6))?).copied().unwrap_or(0);
    let size = Size { cpu_milli: 1000 << numbers.below(3), memory_mib, disk_mib: 10 << 10 };
    let mut placement = Placement::default();
    match numbers.below(10) {
        0 => placement.constraints = vec!["disk=ssd".parse()?],
        1 => {
            placement.constraints =
                vec![format!("zone in ({},{})", numbers.below(5), numbers.below(5)).parse()?]
        }
        2 => {
            let group = format!("g{}", numbers.below(400));
            placement.anti_affinity = vec![AntiAffinity { group, scope: Scope::Node, soft: false }];
        }
        3 => {
            let group = format!("s{}", numbers.below(400));
            placement.anti_affinity = vec![AntiAffinity { group, scope: Scope::Rack, soft: true }];
        }
        4 => placement.strategy = Strategy::Pack,
        5 => {
            placement.priority = 900;
            placement.preemption.policy = PreemptionPolicy::LowerPriority;
        }
        6 => {
            placement.priority = 800;
            placement.preemption.policy = PreemptionPolicy::CostAware;
        }
        7 => placement.priority = 100,
        _ => {}
    }
    Ok((size, placement))
}

fn request<'a>(size: Size, placement: &'a Placement) -> Request<'a> {
    Request { project: "p", size, placement, image: None, data: Data::Anywhere, avoid: &[], untold: false }
}

fn placed(number: u64, size: Size, placement: &Placement) -> Placed {
    Placed {
        id: VmId::from_u128(u128::from(number)),
        project: "p".into(),
        size,
        accelerators: placement.accelerators.clone(),
        groups: placement.anti_affinity.clone(),
        priority: placement.priority,
        stays: false,
    }
}

/// The decision, and how long it took together with taking it over.
fn one(view: &mut View, number: u64, size: Size, placement: &Placement) -> (Decision, Duration) {
    let begin = Instant::now();
    let decision = place(view, &request(size, placement));
    if let Decision::Place { node, victims } = &decision {
        for victim in victims {
            view.take(*node, *victim);
        }
        view.put(*node, placed(number, size, placement));
    }
    (decision, begin.elapsed())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || {
        arguments.next().context("place NODES VMS PLACEMENTS")?.parse::<u64>().context("a number is needed")
    };
    let (nodes, vms, placements) = (next()?, next()?, next()?);
    let mut view = View::default();
    (1..=nodes).for_each(|id| view.set_node(node(id)));
    let mut numbers = Numbers(1);
    let mut there = std::collections::VecDeque::new();
    let mut number = 0;
    while number < vms {
        number += 1;
        let (size, mut placement) = wanted(&mut numbers)?;
        placement.preemption.policy = PreemptionPolicy::Never;
        if let (Decision::Place { node, .. }, _) = one(&mut view, number, size, &placement) {
            there.push_back((node, number));
        }
    }
    let filled = there.len();
    let mut times = Vec::new();
    let (mut refused, mut preempting) = (0, 0);
    for _ in 0..placements {
        number += 1;
        let (size, placement) = wanted(&mut numbers)?;
        let (decision, took) = one(&mut view, number, size, &placement);
        times.push(u64::try_from(took.as_nanos())?);
        match decision {
            Decision::Place { node, victims } => {
                preempting += u64::from(!victims.is_empty());
                there.push_back((node, number));
                if let Some((node, old)) = there.pop_front() {
                    view.take(node, VmId::from_u128(u128::from(old)));
                }
            }
            Decision::Refused(_) => refused += 1,
        }
    }
    let begin = Instant::now();
    let snapshots = 100;
    (0..snapshots).for_each(|_| drop(std::hint::black_box(view.clone())));
    let snapshot_ns = u64::try_from(begin.elapsed().as_nanos())? / snapshots;
    let full = view.nodes().map(|node| u64::from(node.fullness())).sum::<u64>() / nodes.max(1);
    let result = serde_json::json!({
        "nodes": nodes, "vms": filled, "fullness_per_mille": full, "refused": refused, "preempting": preempting,
        "snapshot_ns": snapshot_ns, "times_ns": times,
    });
    println!("{result}");
    Ok(())
}
