//! What of a report is worth replicating.

use blixard_agent_api::{Epoch, Generation, Start};

use blixard_api::health::HealthState;

use super::*;
use crate::state::testing::{Cluster, create, id};

fn told(number: u128, start: u64, phase: AgentPhase) -> VmReport {
    VmReport {
        start: Start(start),
        phase,
        guest_ready: phase == AgentPhase::Running,
        memory_bytes: Some(1),
        ..VmReport::pending(id(number), Epoch(1))
    }
}

fn report(generation: u64, vms: Vec<VmReport>) -> HostReport {
    HostReport { generation: Generation(generation), vms, ..HostReport::default() }
}

#[test]
fn a_phase_is_replicated_once_and_usage_and_reasons_not_at_all() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let first = report(1, vec![told(1, 1, AgentPhase::Starting)]);
    let commands = news(&cluster.state, 1, &first);
    assert_eq!(commands.len(), 1);
    cluster.run(commands[0].clone()).unwrap();
    let mut vm = told(1, 1, AgentPhase::Starting);
    vm.memory_bytes = Some(2);
    vm.reason = Some("still at it".into());
    assert_eq!(news(&cluster.state, 1, &report(1, vec![vm])), []);
    assert_eq!(
        news(&cluster.state, 2, &report(1, vec![told(1, 1, AgentPhase::Running)])),
        [],
        "not its node"
    );
}

#[test]
fn why_something_failed_is_replicated() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let mut vm = told(1, 1, AgentPhase::Failed);
    vm.reason = Some("x".repeat(10_000));
    let commands = news(&cluster.state, 1, &report(1, vec![vm]));
    let Command::RecordReport { observed, .. } = &commands[0] else { panic!() };
    assert_eq!(observed.reason.as_ref().unwrap().len(), REASON_MAX);
}

#[test]
fn a_vm_is_forgotten_when_a_report_about_a_plan_without_it_does_not_show_it() {
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let gone = cluster.vm(Command::DeleteVm { id: id(1), force: true, if_generation: None });
    let forget = [Command::ForgetVm { id: id(1), epoch: 1 }];
    assert_eq!(news(&cluster.state, 1, &report(gone.unlisted_since - 1, vec![])), [], "an older plan");
    let there = report(gone.unlisted_since, vec![told(1, 1, AgentPhase::Stopping)]);
    assert!(!news(&cluster.state, 1, &there).contains(&forget[0]), "still there");
    assert_eq!(news(&cluster.state, 1, &report(gone.unlisted_since, vec![])), forget);
}

#[test]
fn of_the_health_each_change_is_replicated_its_output_along_with_it_and_nothing_below_its_level() {
    let ill = |state, output: &str| {
        let health = Some(Health { state, output: output.into() });
        report(1, vec![VmReport { health, ..told(1, 1, AgentPhase::Running) }])
    };
    let mut cluster = Cluster::new(16);
    cluster.run(create(1, "a")).unwrap();
    let healthy = ill(HealthState::Healthy, "fine");
    let commands = news(&cluster.state, 1, &healthy);
    cluster.run(commands[0].clone()).unwrap();
    assert_eq!(news(&cluster.state, 1, &healthy), []);
    assert_eq!(news(&cluster.state, 1, &ill(HealthState::Healthy, "still fine")), []);
    let commands = news(&cluster.state, 1, &ill(HealthState::Unhealthy, &"x".repeat(10_000)));
    let Command::RecordReport { observed, .. } = &commands[0] else { panic!() };
    let health = observed.health.as_ref().unwrap();
    assert_eq!((health.state, health.output.len()), (HealthState::Unhealthy, REASON_MAX));

    let mut older = Cluster::at_level(16, crate::state::command::HEALTH_LEVEL - 1);
    older.run(create(1, "a")).unwrap();
    let commands = news(&older.state, 1, &healthy);
    let Command::RecordReport { observed, .. } = &commands[0] else { panic!() };
    assert_eq!((observed.health.as_ref(), commands[0].level()), (None, 1));
}
