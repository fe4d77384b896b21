//! `node drain`, `down`, `set`: what operators say about nodes; and what `run` asks of a VM's place.

use std::collections::BTreeMap;
use std::time::Duration;

use blixard_api::placement::{
    AntiAffinity, Constraint, OnNodeLoss, Placement, Preemption, PreemptionPolicy, Restart, RestartWhen,
    Strategy, Taint, Toleration,
};
use blixard_api::vm::CreateVm;
use clap::{Args, Subcommand, ValueEnum};

use crate::error::{CliError, code};
use crate::{Context, units};

/// What a VM asks of its place.
#[derive(Debug, Args)]
#[command(next_help_heading = "Placement")]
pub struct Place {
    /// What a label of the node must be like: key=value, key!=value, "key in (a,b)" or key
    #[arg(long = "constraint", value_name = "CONDITION")]
    pub constraints: Vec<Constraint>,
    /// Taint that does not keep it away: key or key=value
    #[arg(long = "toleration", value_name = "TAINT")]
    pub tolerations: Vec<Toleration>,
    /// Group whose members keep apart: GROUP, then :node, :rack, :zone or :datacenter, then :soft if it is only a wish
    #[arg(long, value_name = "GROUP")]
    pub anti_affinity: Vec<AntiAffinity>,
    /// Devices that it needs: KIND=COUNT
    #[arg(long = "accelerator", value_name = "KIND=COUNT", value_parser = accelerator)]
    pub accelerators: Vec<(String, u32)>,
    /// Who goes first, 0 to 1000
    #[arg(long, value_name = "N", default_value = "500", value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub priority: u16,
    /// VMs of lower priority that may be stopped to make room
    #[arg(long, value_enum, value_name = "WHICH", default_value = "never")]
    pub preempt: Preempt,
    /// Which of the possible nodes is preferred
    #[arg(long, value_enum, value_name = "WHICH", default_value = "spread")]
    pub strategy: Prefer,
    /// What becomes of it when its node is lost
    #[arg(long, value_enum, value_name = "WHAT", default_value = "restart")]
    pub on_node_loss: Loss,
    /// When it is started again after it has ended
    #[arg(long, value_enum, value_name = "WHEN", default_value = "never")]
    pub restart: When,
    /// Only say where it would go
    #[arg(long)]
    pub dry_run: bool,
    /// Say how many nodes each constraint refuses; starts nothing
    #[arg(long)]
    pub explain: bool,
}

/// See [`PreemptionPolicy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preempt {
    /// None
    Never,
    /// The least important, as few as possible
    LowerPriority,
    /// Those whose size, weighted by priority, is least
    CostAware,
}

/// See [`Strategy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Prefer {
    /// The emptiest
    Spread,
    /// The fullest
    Pack,
}

/// See [`OnNodeLoss`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Loss {
    /// It is started elsewhere, with a new disk
    Restart,
    /// It runs on there and is never started elsewhere
    Wait,
}

/// See [`RestartWhen`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// When somebody says so
    Never,
    /// When it failed
    OnFailure,
    /// Always
    Always,
}

fn accelerator(text: &str) -> Result<(String, u32), String> {
    let form = || "KIND=COUNT is needed, for example gpu=1".to_owned();
    let (kind, count) = text.split_once('=').ok_or_else(form)?;
    let count = count.parse().ok().filter(|count| *count > 0).ok_or_else(form)?;
    if kind.is_empty() { Err(form()) } else { Ok((kind.to_owned(), count)) }
}

impl Place {
    /// As the API takes it.
    pub fn placement(&self) -> Placement {
        Placement {
            constraints: self.constraints.clone(),
            tolerations: self.tolerations.clone(),
            anti_affinity: self.anti_affinity.clone(),
            accelerators: self.accelerators.iter().cloned().collect::<BTreeMap<_, _>>(),
            priority: self.priority,
            preemption: Preemption {
                policy: match self.preempt {
                    Preempt::Never => PreemptionPolicy::Never,
                    Preempt::LowerPriority => PreemptionPolicy::LowerPriority,
                    Preempt::CostAware => PreemptionPolicy::CostAware,
                },
                ..Preemption::default()
            },
            strategy: match self.strategy {
                Prefer::Spread => Strategy::Spread,
                Prefer::Pack => Strategy::Pack,
            },
            on_node_loss: match self.on_node_loss {
                Loss::Restart => OnNodeLoss::Restart,
                Loss::Wait => OnNodeLoss::Wait,
            },
            ..Placement::default()
        }
    }

    /// As the API takes it.
    pub fn restart(&self) -> Restart {
        let when = match self.restart {
            When::Never => RestartWhen::Never,
            When::OnFailure => RestartWhen::OnFailure,
            When::Always => RestartWhen::Always,
        };
        Restart { when, ..Restart::default() }
    }
}

/// Says where a VM would go; with `--explain` also why not elsewhere.
pub async fn explain(context: &Context, request: &CreateVm, place: &Place) -> Result<u8, CliError> {
    let view = context.client.explain_vm(&context.project, request).await?;
    let output = context.output;
    if output.structured() {
        output.value(&view)?;
    } else {
        match &view.node {
            Some(node) if view.victims.is_empty() => output.line(node)?,
            Some(node) => {
                output.line(&format!("{node}, once these are stopped: {}", view.victims.join(", ")))?
            }
            None => output.line("no node")?,
        }
        if place.explain {
            output.line(&format!("{} of {} nodes are possible", view.possible, view.nodes))?;
            for by in &view.refused {
                output.line(&format!("{:>6} refused by: {}", by.nodes, by.constraint))?;
            }
        }
    }
    Ok(if view.node.is_some() { 0 } else { code::NO_CAPACITY })
}

/// Commands of `node` about placement.
#[derive(Debug, Subcommand)]
pub enum Operate {
    /// Move VMs away: each is stopped in good order and started elsewhere; those that wait for their node stay
    Drain {
        /// Time that each VM has to end
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::parse_duration)]
        grace: Duration,
        #[command(flatten)]
        nodes: Nodes,
    },
    /// Declare nodes down that will not come back, whatever was declared down just before
    Down {
        /// Needed: nobody checks it, and VMs of a node that still runs would run twice
        #[arg(long, required = true)]
        force: bool,
        #[command(flatten)]
        nodes: Nodes,
    },
    /// Show or change what a node is like: labels, taints, overcommit
    Set(Box<Set>),
}

/// Some nodes.
#[derive(Debug, Args)]
pub struct Nodes {
    /// Names
    #[arg(required = true, value_name = "NODE")]
    pub nodes: Vec<String>,
}

/// Options of `node set`.
#[derive(Debug, Args)]
pub struct Set {
    /// Label; `key=` removes it
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = units::parse_label)]
    pub label: Vec<(String, String)>,
    /// Taint: key[=value]:no-schedule or :prefer-no-schedule
    #[arg(long, value_name = "TAINT")]
    pub taint: Vec<Taint>,
    /// Removes the taints with this key
    #[arg(long, value_name = "KEY")]
    pub untaint: Vec<String>,
    /// vCPUs per 100 processors
    #[arg(long, value_name = "PERCENT")]
    pub overcommit_cpu: Option<u32>,
    /// Memory of VMs per 100 MiB
    #[arg(long, value_name = "PERCENT")]
    pub overcommit_memory: Option<u32>,
    /// Disks of VMs per 100 MiB
    #[arg(long, value_name = "PERCENT")]
    pub overcommit_disk: Option<u32>,
    /// Memory that is left to the host
    #[arg(long, value_name = "SIZE", value_parser = units::parse_mib)]
    pub reserve_memory: Option<u64>,
    /// What it costs, in any unit that all nodes share
    #[arg(long, value_name = "N")]
    pub cost: Option<u32>,
    /// Devices for VMs: KIND=COUNT
    #[arg(long = "accelerator", value_name = "KIND=COUNT", value_parser = accelerator)]
    pub accelerators: Vec<(String, u32)>,
    /// Name
    pub node: String,
}

/// `node drain`, `down`, `set`.
pub async fn operate(context: &Context, command: Operate) -> Result<u8, CliError> {
    let client = &context.client;
    match command {
        Operate::Drain { grace, nodes } => {
            let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            for name in &nodes.nodes {
                context.output.line(&client.drain(name, grace_ms).await?.name)?;
            }
        }
        Operate::Down { nodes, .. } => {
            for name in &nodes.nodes {
                context.output.line(&client.declare_down(name).await?.name)?;
            }
        }
        Operate::Set(set) => return self::set(context, *set).await,
    }
    Ok(0)
}

async fn set(context: &Context, set: Set) -> Result<u8, CliError> {
    let before = context.client.node_policy(&set.node).await?;
    let mut policy = before.clone();
    for (key, value) in set.label {
        if value.is_empty() {
            policy.labels.remove(&key);
        } else {
            policy.labels.insert(key, value);
        }
    }
    policy.taints.retain(|taint| !set.untaint.contains(&taint.key) && !set.taint.contains(taint));
    policy.taints.extend(set.taint);
    policy.cpu_percent = set.overcommit_cpu.unwrap_or(policy.cpu_percent);
    policy.memory_percent = set.overcommit_memory.unwrap_or(policy.memory_percent);
    policy.disk_percent = set.overcommit_disk.unwrap_or(policy.disk_percent);
    policy.reserve_memory_mib = set.reserve_memory.unwrap_or(policy.reserve_memory_mib);
    policy.cost = set.cost.unwrap_or(policy.cost);
    policy.accelerators.extend(set.accelerators);
    if policy != before {
        context.client.set_node_policy(&set.node, &policy).await?;
    }
    context.output.value(&policy)?;
    Ok(0)
}
