//! Pure: the replicated state → everything one node shall run.

use std::collections::BTreeSet;
use std::net::IpAddr;

use blixard_agent_api::plan::{NicPlan, OnLeaseEnd};
use blixard_agent_api::{BlobRef, Epoch, Generation, HostPlan, Run, Start, VmPlan, VolumePlan};
use blixard_api::placement::OnNodeLoss;
use blixard_api::vm::Desired;
use blixard_netd_api::{NetworkSpec, NicId, NicSpec};

use crate::state::{NetworkRecord, NicRecord, NodeId, State, VmRecord};

/// The plan of a node; `None` while the node is unknown.
///
/// Equal generations mean equal plans: every command that changes what is read here also changes the generation.
pub fn plan_for(state: &State, node: NodeId, resolvers: &[IpAddr]) -> Option<HostPlan> {
    let record = state.node(node)?;
    let here = |vm: &&std::sync::Arc<VmRecord>| vm.node == node && vm.unlisted_since == 0;
    let vms = state.vms().filter(here).map(|vm| vm_plan(state, vm, resolvers)).collect();
    // Content is sent before the first VM asks for it, so that a start does not wait for a copy.
    let mut blobs: BTreeSet<BlobRef> = state.images().map(|image| image.blob).collect();
    blobs.extend(state.kernels().flat_map(|kernel| [kernel.kernel, kernel.initramfs]));
    Some(HostPlan {
        generation: Generation(record.plan_generation),
        networks: state.networks().map(|network| network_spec(network)).collect(),
        vms,
        blobs: blobs.into_iter().collect(),
    })
}

fn network_spec(network: &NetworkRecord) -> NetworkSpec {
    NetworkSpec {
        name: network.name.clone(),
        subnets: vec![network.v4, network.v6],
        nat: network.nat,
        mtu: network.mtu,
    }
}

fn vm_plan(state: &State, vm: &VmRecord, resolvers: &[IpAddr]) -> VmPlan {
    let nic = vm.nic.as_ref().and_then(|nic| Some(nic_plan(vm, nic, state.network(&nic.network)?)));
    VmPlan {
        vm: vm.id,
        name: vm.name.clone(),
        epoch: Epoch(vm.epoch),
        run: match vm.desired {
            Desired::Running => match vm.upkeep.leaving {
                Some(leaving) => Run::Stopped { grace_ms: leaving.grace_ms },
                None => Run::Running,
            },
            Desired::Stopped | Desired::Gone => Run::Stopped { grace_ms: vm.grace_ms },
        },
        start: Start(vm.start),
        vcpus: vm.spec.vcpus,
        memory_mib: vm.spec.memory_mib,
        kernel: vm.pins.kernel,
        initramfs: vm.pins.initramfs,
        cmdline: vm.spec.cmdline.clone(),
        image: vm.pins.image,
        image_fs: vm.pins.image_fs.clone(),
        volume: VolumePlan { size_bytes: vm.spec.disk_mib.saturating_mul(1 << 20) },
        resolvers: if nic.is_some() { resolvers.to_vec() } else { Vec::new() },
        nic,
        workload: vm.workload.clone(),
        health: vm.health.clone(),
        on_lease_end: match vm.spec.placement.on_node_loss {
            OnNodeLoss::Restart => OnLeaseEnd::Freeze,
            OnNodeLoss::Wait => OnLeaseEnd::RunOn,
        },
    }
}

fn nic_plan(vm: &VmRecord, nic: &NicRecord, network: &NetworkRecord) -> NicPlan {
    NicPlan {
        spec: NicSpec {
            id: NicId::new(vm.id, 0),
            network: nic.network.clone(),
            mac: nic.mac(),
            addresses: nic.addresses(),
        },
        addresses: vec![(nic.v4.into(), network.v4.prefix), (nic.v6.into(), network.v6.prefix)],
        gateways: vec![network.v4.gateway, network.v6.gateway],
    }
}
