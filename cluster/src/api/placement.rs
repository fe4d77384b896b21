//! Where new VMs go, and what operators say about nodes.

use std::time::Duration;

use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use blixard_api::placement::{
    DrainNode, PLACEMENT_CHARS_MAX, PLACEMENT_ITEMS_MAX, PRIORITY_MAX, Placement, PlacementView, RefusedBy,
    Restart,
};
use blixard_api::vm::VmSpec;

use super::error::Failure;
use super::nodes::no_node;
use super::query::Parameters;
use super::{Api, Shared, answer, body, mutate};
use crate::scheduler::{self, Data, Decision, Explanation, Reason, View, cluster};
use crate::state::placement::{Departure, NodeChange, VmChange};
use crate::state::{Answer, Command, Key, NodeId, NodePolicy, Refusal};

/// Longest wait for nodes that have not told what they have.
const TELL_MAX: Duration = Duration::from_secs(3);
/// How often a placement that no longer fits is worked out anew.
const TRIES_MAX: usize = 5;
/// Longest grace time of a drain or preemption in milliseconds (a day).
const GRACE_MS_MAX: u64 = 24 * 60 * 60 * 1000;
/// Least pause before a restart in milliseconds.
const PAUSE_MS_MIN: u64 = 100;

/// What a placement is worked out from.
struct Plan {
    view: View,
    image: Option<blixard_agent_api::Digest>,
    /// Nodes of such a cluster cannot tell what they have.
    untold: bool,
}

impl Api {
    fn planning(&self, spec: &VmSpec) -> Plan {
        let state = self.consensus.replica().state();
        Plan {
            view: state.view().clone(),
            image: state.image(&spec.image).map(|image| image.blob.digest),
            untold: !state.places(),
        }
    }

    /// Makes a VM on the best node that takes it. A node that was filled or removed meanwhile leads to another one.
    ///
    /// # Errors
    /// 507 with the number of nodes that each constraint refused; what the state refuses.
    pub async fn create_placed(
        &self,
        key: Option<Key>,
        id: blixard_api::VmId,
        project: String,
        name: String,
        spec: VmSpec,
    ) -> Result<(u64, Answer), Failure> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (node, victims) = self.choose(id, &project, &spec).await?;
            let command = Command::CreateVm {
                id,
                project: project.clone(),
                name: name.clone(),
                spec: Box::new(spec.clone()),
                node,
                waits: !victims.is_empty(),
            };
            let done = self.propose_raw(key.clone(), command).await?;
            match done {
                // The node was filled or removed meanwhile, which this node has heard of by now.
                (_, Err(Refusal::NoRoom { .. } | Refusal::NoNode(_))) if tries < TRIES_MAX => {}
                (revision, outcome) => {
                    let answer = outcome?;
                    self.preempt(&victims, spec.placement.preemption.grace_ms).await;
                    return Ok((revision, answer));
                }
            }
        }
    }

    /// The node for a VM. When none has room by what this node knows, it asks the leader whether that is still so. A node that has just
    /// started may have room: it is waited for until it has told.
    async fn choose(
        &self,
        id: blixard_api::VmId,
        project: &str,
        spec: &VmSpec,
    ) -> Result<(NodeId, Vec<blixard_api::VmId>), Failure> {
        let told = tokio::time::sleep(TELL_MAX);
        tokio::pin!(told);
        let mut revisions = self.consensus.replica().revisions();
        let mut caught_up = false;
        loop {
            revisions.mark_unchanged();
            // A repetition is answered whatever room there is now.
            if let Some(node) = self.consensus.replica().state().vm(id).map(|vm| vm.node) {
                return Ok((node, Vec::new()));
            }
            let plan = self.planning(spec);
            let why = match scheduler::place(&plan.view, &request(project, spec, &plan)) {
                Decision::Place { node, victims } => return Ok((node, victims)),
                Decision::Refused(why) => why,
            };
            if !caught_up {
                self.catch_up().await?;
                caught_up = true;
                continue;
            }
            if !why.refused.contains_key(&Reason::Untold) {
                return Err(no_room(&why, spec));
            }
            tokio::select! {
                biased;
                changed = revisions.changed() => if changed.is_err() {
                    return Err(Failure::unavailable("this node is stopping"));
                },
                () = self.stop.cancelled() => return Err(Failure::unavailable("this node is stopping")),
                () = &mut told => return Err(no_room(&why, spec)),
            }
        }
    }

    /// Asks these VMs to leave. One that cannot be asked is asked again when the VM that needs its room still waits.
    async fn preempt(&self, victims: &[blixard_api::VmId], grace_ms: u64) {
        for id in victims {
            let epoch = self.consensus.replica().state().vm(*id).map(|vm| vm.epoch);
            let Some(epoch) = epoch else { continue };
            let change = VmChange::Evict { why: Departure::Preempted, grace_ms };
            if let Err(failure) = self.propose(None, Command::Vm { id: *id, epoch, change }).await {
                tracing::warn!(vm = %id, "cannot preempt a VM: {}", failure.body.message);
            }
        }
    }

    /// Where a VM would go, and why not elsewhere.
    pub fn explain(&self, project: &str, spec: &VmSpec) -> PlacementView {
        let plan = self.planning(spec);
        let request = request(project, spec, &plan);
        let why = scheduler::explain(&plan.view, &request);
        let state = self.consensus.replica().state();
        let (node, victims) = match scheduler::place(&plan.view, &request) {
            Decision::Place { node, victims } => (state.node(node).map(|node| node.name.clone()), victims),
            Decision::Refused(_) => (None, Vec::new()),
        };
        let name =
            |id| state.vm(id).map_or_else(|| id.to_string(), |vm| format!("{}/{}", vm.project, vm.name));
        PlacementView {
            node,
            victims: victims.into_iter().map(name).collect(),
            nodes: why.nodes,
            possible: why.possible,
            refused: refused_by(&why, &spec.placement),
        }
    }
}

fn request<'a>(project: &'a str, spec: &'a VmSpec, plan: &Plan) -> scheduler::Request<'a> {
    scheduler::Request {
        project,
        size: cluster::size(spec),
        placement: &spec.placement,
        image: plan.image,
        data: Data::Anywhere,
        avoid: &[],
        untold: plan.untold,
    }
}

fn refused_by(why: &Explanation, placement: &Placement) -> Vec<RefusedBy> {
    let words = |reason| Explanation::words(reason, placement);
    why.refused
        .iter()
        .map(|(reason, nodes)| RefusedBy { constraint: words(*reason), nodes: *nodes })
        .collect()
}

fn no_room(why: &Explanation, spec: &VmSpec) -> Failure {
    let counts: Vec<String> = refused_by(why, &spec.placement)
        .iter()
        .map(|by| format!("{} ({})", by.constraint, by.nodes))
        .collect();
    let text = format!(
        "none of {} nodes takes a VM of {} vCPUs, {} MiB of memory and {} MiB of disk: {}",
        why.nodes,
        spec.vcpus,
        spec.memory_mib,
        spec.disk_mib,
        counts.join(", ")
    );
    Failure::no_capacity(text).suggest(if why.refused.contains_key(&Reason::Untold) {
        "does the agent run there? systemctl status blixard-agent"
    } else {
        "ask for less, stop VMs, or see: blixard run --dry-run --explain"
    })
}

/// `PUT /v1/nodes/{name}/policy`
pub async fn set_policy(
    State(api): State<Shared>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    let (parts, content) = request.into_parts();
    Parameters::of(&parts.uri, &[])?;
    let bytes = body::read(&parts.headers, content).await?;
    let policy: NodePolicy = body::parse(&bytes)?.complete()?;
    change(&api, &name, &parts, &bytes, NodeChange::Policy(Box::new(policy))).await
}

/// `GET /v1/nodes/{name}/policy`
pub async fn policy(State(api): State<Shared>, Path(name): Path<String>) -> Result<Response, Failure> {
    let state = api.consensus.replica().state();
    let node = state.node_named(&name).ok_or_else(|| no_node(&name))?;
    Ok(answer(StatusCode::OK, state.revision(), &node.offer.policy))
}

/// `POST /v1/nodes/{name}:drain` and `:down`; see [`super::nodes::act`].
pub(super) async fn operate(
    api: &Api,
    name: &str,
    verb: &str,
    parts: &axum::http::request::Parts,
    bytes: &[u8],
) -> Result<Response, Failure> {
    let wanted = match verb {
        "down" => NodeChange::ForceDown,
        "drain" => {
            let drain =
                if bytes.is_empty() { DrainNode::default() } else { body::parse(bytes)?.complete()? };
            if drain.grace_ms > GRACE_MS_MAX {
                let text = format!("0 to {GRACE_MS_MAX} milliseconds are possible");
                return Err(Failure::field("grace_ms", "out_of_range", text));
            }
            NodeChange::Drain { grace_ms: drain.grace_ms }
        }
        other => {
            return Err(Failure::not_found(format!("a node knows no {other:?}"))
                .suggest(":cordon :uncordon :drain :down"));
        }
    };
    change(api, name, parts, bytes, wanted).await
}

async fn change(
    api: &Api,
    name: &str,
    parts: &axum::http::request::Parts,
    bytes: &[u8],
    change: NodeChange,
) -> Result<Response, Failure> {
    let key = mutate::key(parts, bytes)?;
    let node = api.node_id(name).await?;
    let (revision, _) = api.propose(key, Command::Node { node, change }).await?;
    let state = api.consensus.replica().state();
    let node = state.node(node).ok_or_else(|| no_node(name))?;
    Ok(answer(StatusCode::OK, revision, &api.node_view(&state, node)))
}

/// Checks what a spec says about its place and restarts.
pub fn check(spec: &VmSpec, wrong: &mut impl FnMut(&str, &str, String)) {
    let Placement { constraints, tolerations, anti_affinity, accelerators, priority, preemption, .. } =
        &spec.placement;
    let lists = [constraints.len(), tolerations.len(), anti_affinity.len(), accelerators.len()];
    if lists.iter().any(|length| *length > PLACEMENT_ITEMS_MAX) {
        wrong(
            "placement",
            "out_of_range",
            format!("at most {PLACEMENT_ITEMS_MAX} entries of each kind are possible"),
        );
    }
    let good = |text: &str| {
        (1..=PLACEMENT_CHARS_MAX).contains(&text.chars().count()) && !text.contains(char::is_control)
    };
    let words = constraints
        .iter()
        .map(|c| c.key.as_str())
        .chain(tolerations.iter().map(|t| t.key.as_str()))
        .chain(anti_affinity.iter().map(|a| a.group.as_str()))
        .chain(accelerators.keys().map(String::as_str));
    if !words.into_iter().all(good) {
        let form =
            format!("keys, groups and kinds have 1 to {PLACEMENT_CHARS_MAX} characters, none is a control");
        wrong("placement", "bad_format", form);
    }
    let mut groups: Vec<&str> = anti_affinity.iter().map(|entry| entry.group.as_str()).collect();
    groups.sort_unstable();
    if groups.windows(2).any(|pair| matches!(pair, [a, b] if a == b)) {
        wrong("placement.anti_affinity", "bad_format", "a group is named once".into());
    }
    if *priority > PRIORITY_MAX {
        wrong("placement.priority", "out_of_range", format!("0 to {PRIORITY_MAX} are possible"));
    }
    if preemption.grace_ms > GRACE_MS_MAX {
        wrong(
            "placement.preemption.grace_ms",
            "out_of_range",
            format!("at most {GRACE_MS_MAX} are possible"),
        );
    }
    let Restart { backoff_ms, backoff_max_ms, .. } = spec.restart;
    if backoff_ms < PAUSE_MS_MIN || backoff_max_ms < backoff_ms || backoff_max_ms > GRACE_MS_MAX {
        let form = format!("{PAUSE_MS_MIN} <= backoff_ms <= backoff_max_ms <= {GRACE_MS_MAX} is needed");
        wrong("restart", "out_of_range", form);
    }
}
