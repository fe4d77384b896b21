//! Where a VM may run, what it needs there, and what shall be done when it or its node fails.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Highest priority.
pub const PRIORITY_MAX: u16 = 1000;
/// Most entries of each list of a placement.
pub const PLACEMENT_ITEMS_MAX: usize = 32;
/// Longest key, value, group or name of an accelerator in characters.
pub const PLACEMENT_CHARS_MAX: usize = 128;

/// What a VM asks of its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Placement {
    /// Processor architecture of the node.
    pub arch: Arch,
    /// What labels of the node must be like; all of them.
    pub constraints: Vec<Constraint>,
    /// Taints of nodes that do not keep it away.
    pub tolerations: Vec<Toleration>,
    /// Groups that it is a member of, whose members keep apart.
    pub anti_affinity: Vec<AntiAffinity>,
    /// Devices by kind, and how many.
    pub accelerators: BTreeMap<String, u32>,
    /// Who goes first, 0 to [`PRIORITY_MAX`].
    pub priority: u16,
    /// Whether others may be stopped for it.
    pub preemption: Preemption,
    /// Which of the possible nodes is preferred.
    pub strategy: Strategy,
    /// What becomes of it when its node is lost.
    pub on_node_loss: OnNodeLoss,
}

impl Default for Placement {
    fn default() -> Self {
        Self {
            arch: Arch::default(),
            constraints: Vec::new(),
            tolerations: Vec::new(),
            anti_affinity: Vec::new(),
            accelerators: BTreeMap::new(),
            priority: 500,
            preemption: Preemption::default(),
            strategy: Strategy::default(),
            on_node_loss: OnNodeLoss::default(),
        }
    }
}

impl Placement {
    /// True when nothing was asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Processor architecture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// Intel and AMD, 64 bits.
    #[default]
    #[serde(rename = "x86_64")]
    X86_64,
    /// Arm, 64 bits.
    Aarch64,
}

/// A condition on one label of a node. As text: `zone=a`, `zone!=a`, `zone in (a,b)`, `ssd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraint {
    /// Key of the label. `node` is the name of the node.
    pub key: String,
    /// Condition.
    #[serde(flatten)]
    pub is: Condition,
}

/// What a label must be like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "op", content = "value")]
pub enum Condition {
    /// It is there with this value.
    Equal(String),
    /// It is not there, or has another value.
    NotEqual(String),
    /// It is there with one of these values.
    In(Vec<String>),
    /// It is there.
    Exists,
}

impl Constraint {
    /// Whether a label with this value, or none, is as it must be.
    pub fn holds(&self, value: Option<&str>) -> bool {
        match &self.is {
            Condition::Equal(wanted) => value == Some(wanted),
            Condition::NotEqual(unwanted) => value != Some(unwanted),
            Condition::In(wanted) => value.is_some_and(|value| wanted.iter().any(|w| w == value)),
            Condition::Exists => value.is_some(),
        }
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.is {
            Condition::Equal(value) => write!(f, "{}={value}", self.key),
            Condition::NotEqual(value) => write!(f, "{}!={value}", self.key),
            Condition::In(values) => write!(f, "{} in ({})", self.key, values.join(",")),
            Condition::Exists => f.write_str(&self.key),
        }
    }
}

/// A text that is no constraint, toleration, taint or group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{form} is needed")]
pub struct PlacementFormError {
    form: &'static str,
}

fn word(text: &str, form: &'static str) -> Result<String, PlacementFormError> {
    let good = !text.is_empty()
        && text.chars().count() <= PLACEMENT_CHARS_MAX
        && !text.contains(|c: char| c.is_control() || c.is_whitespace() || "=!(),:".contains(c));
    if good { Ok(text.to_owned()) } else { Err(PlacementFormError { form }) }
}

impl FromStr for Constraint {
    type Err = PlacementFormError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = "key=value, key!=value, key in (a,b) or key";
        let text = text.trim();
        let made = |key: &str, is| Ok(Self { key: word(key.trim(), form)?, is });
        if let Some((key, value)) = text.split_once("!=") {
            return made(key, Condition::NotEqual(word(value.trim(), form)?));
        }
        if let Some((key, value)) = text.split_once('=') {
            return made(key, Condition::Equal(word(value.trim(), form)?));
        }
        if let Some((key, rest)) = text.split_once(" in ") {
            let inner = rest.trim().strip_prefix('(').and_then(|rest| rest.strip_suffix(')'));
            let values = inner.ok_or(PlacementFormError { form })?.split(',');
            let values: Result<Vec<String>, _> = values.map(|value| word(value.trim(), form)).collect();
            return made(key, Condition::In(values?));
        }
        made(text, Condition::Exists)
    }
}

/// A mark that keeps VMs away from a node. As text: `key=value:no-schedule`, `key:prefer-no-schedule`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taint {
    /// Key.
    pub key: String,
    /// Value; may be empty.
    #[serde(default)]
    pub value: String,
    /// How far it keeps VMs away.
    pub effect: TaintEffect,
}

/// How far a taint keeps VMs away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaintEffect {
    /// No VM without a toleration is placed there. VMs that are there stay.
    NoSchedule,
    /// Other nodes are preferred.
    PreferNoSchedule,
}

impl fmt::Display for Taint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        if !self.value.is_empty() {
            write!(f, "={}", self.value)?;
        }
        f.write_str(match self.effect {
            TaintEffect::NoSchedule => ":no-schedule",
            TaintEffect::PreferNoSchedule => ":prefer-no-schedule",
        })
    }
}

impl FromStr for Taint {
    type Err = PlacementFormError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = "key[=value]:no-schedule or key[=value]:prefer-no-schedule";
        let (mark, effect) = text.trim().rsplit_once(':').ok_or(PlacementFormError { form })?;
        let effect = match effect {
            "no-schedule" => TaintEffect::NoSchedule,
            "prefer-no-schedule" => TaintEffect::PreferNoSchedule,
            _ => return Err(PlacementFormError { form }),
        };
        let (key, value) = match mark.split_once('=') {
            Some((key, value)) => (word(key, form)?, word(value, form)?),
            None => (word(mark, form)?, String::new()),
        };
        Ok(Self { key, value, effect })
    }
}

/// A taint that is put up with. As text: `key` (any value) or `key=value`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Toleration {
    /// Key of the taint.
    pub key: String,
    /// Its value; absent: any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

impl Toleration {
    /// Whether this taint is put up with.
    pub fn covers(&self, taint: &Taint) -> bool {
        self.key == taint.key && self.value.as_ref().is_none_or(|value| *value == taint.value)
    }
}

impl FromStr for Toleration {
    type Err = PlacementFormError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = "key or key=value";
        match text.trim().split_once('=') {
            Some((key, value)) => Ok(Self { key: word(key, form)?, value: Some(word(value, form)?) }),
            None => Ok(Self { key: word(text.trim(), form)?, value: None }),
        }
    }
}

/// Membership in a group of the project whose members keep apart. As text: `group[:scope][:soft]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AntiAffinity {
    /// Name of the group.
    pub group: String,
    /// How far apart.
    #[serde(default)]
    pub scope: Scope,
    /// Only preferred; otherwise no other member is in the same place, whoever came first.
    #[serde(default)]
    pub soft: bool,
}

impl FromStr for AntiAffinity {
    type Err = PlacementFormError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = "group, group:scope or group:scope:soft with node, rack, zone or datacenter as scope";
        let mut parts = text.trim().split(':');
        let group = word(parts.next().unwrap_or_default(), form)?;
        let mut parsed = Self { group, scope: Scope::Node, soft: false };
        for (at, part) in parts.enumerate() {
            match (at, part) {
                (0, "node") => parsed.scope = Scope::Node,
                (0, "rack") => parsed.scope = Scope::Rack,
                (0, "zone") => parsed.scope = Scope::Zone,
                (0, "datacenter") => parsed.scope = Scope::Datacenter,
                (0 | 1, "soft") if !parsed.soft => parsed.soft = true,
                _ => return Err(PlacementFormError { form }),
            }
        }
        Ok(parsed)
    }
}

/// A failure domain. Racks, zones and datacenters are labels of nodes with these keys; nodes without one share a domain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// One node.
    #[default]
    Node,
    /// Label `rack`.
    Rack,
    /// Label `zone`.
    Zone,
    /// Label `datacenter`.
    Datacenter,
}

impl Scope {
    /// All scopes from small to large.
    pub const ALL: [Self; 4] = [Self::Node, Self::Rack, Self::Zone, Self::Datacenter];

    /// The word for it, and the key of its label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Rack => "rack",
            Self::Zone => "zone",
            Self::Datacenter => "datacenter",
        }
    }
}

/// Whether VMs of lower priority may be stopped to make room.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Preemption {
    /// Which ones.
    pub policy: PreemptionPolicy,
    /// Time that they have to end in good order, in milliseconds.
    pub grace_ms: u64,
}

impl Default for Preemption {
    fn default() -> Self {
        Self { policy: PreemptionPolicy::Never, grace_ms: 30_000 }
    }
}

/// Which VMs may be stopped to make room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreemptionPolicy {
    /// None.
    #[default]
    Never,
    /// Those of lower priority: the least important first, then as few as possible.
    LowerPriority,
    /// Those of lower priority whose size, weighted by priority, is least in sum.
    CostAware,
}

/// Which of the possible nodes is preferred.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// The emptiest.
    #[default]
    Spread,
    /// The fullest.
    Pack,
}

/// What becomes of a VM when its node is lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNodeLoss {
    /// It is started elsewhere, with a new volume; the lost node freezes it when its lease ends.
    #[default]
    Restart,
    /// It keeps running there, whatever the cluster can see, and is never started elsewhere.
    Wait,
}

/// What happens when a VM ends although it shall run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Restart {
    /// When it is started again.
    pub when: RestartWhen,
    /// Pause before the first time in milliseconds; it doubles each time.
    pub backoff_ms: u64,
    /// Longest pause in milliseconds. A VM that ran for this long or more begins with the first pause again.
    pub backoff_max_ms: u64,
    /// How often in a row; absent: without end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

impl Default for Restart {
    fn default() -> Self {
        Self { when: RestartWhen::Never, backoff_ms: 1_000, backoff_max_ms: 300_000, limit: None }
    }
}

impl Restart {
    /// True when nothing was asked for.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Pause in milliseconds before the next start after `restarts` in a row.
    pub fn pause_ms(&self, restarts: u32) -> u64 {
        let doubled = 1u64.checked_shl(restarts).and_then(|factor| self.backoff_ms.checked_mul(factor));
        doubled.unwrap_or(u64::MAX).min(self.backoff_max_ms)
    }
}

/// When a VM that ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartWhen {
    /// When somebody says so.
    #[default]
    Never,
    /// When it ended by a fault or its workload with another code than 0.
    OnFailure,
    /// However it ended.
    Always,
}

/// What an operator says about a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodePolicy {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Taints.
    pub taints: Vec<Taint>,
    /// vCPUs per 100 processors.
    pub cpu_percent: u32,
    /// Memory of VMs per 100 MiB of memory.
    pub memory_percent: u32,
    /// Volumes per 100 MiB of disk: they are sparse.
    pub disk_percent: u32,
    /// Memory in MiB that is left to the host.
    pub reserve_memory_mib: u64,
    /// Processors in thousandths that are left to the host.
    pub reserve_cpu_milli: u64,
    /// What it costs, in any unit that all nodes share.
    pub cost: u32,
    /// Devices for VMs, by kind.
    pub accelerators: BTreeMap<String, u32>,
}

impl Default for NodePolicy {
    fn default() -> Self {
        Self {
            labels: BTreeMap::new(),
            taints: Vec::new(),
            cpu_percent: 10_000,
            memory_percent: 100,
            disk_percent: 1000,
            reserve_memory_mib: 0,
            reserve_cpu_milli: 0,
            cost: 0,
            accelerators: BTreeMap::new(),
        }
    }
}

/// Body of a drain request; it may be empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainNode {
    /// Time that each VM has to end in good order, in milliseconds.
    pub grace_ms: u64,
}

impl Default for DrainNode {
    fn default() -> Self {
        Self { grace_ms: 30_000 }
    }
}

/// Where a VM would be placed, and why not elsewhere: answer of a create request with `?dry_run=true`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementView {
    /// Name of the node; absent when none is possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Names or ids of the VMs that would be stopped for it.
    #[serde(default)]
    pub victims: Vec<String>,
    /// How many nodes there are.
    pub nodes: usize,
    /// How many of them are possible without stopping anything.
    pub possible: usize,
    /// How many nodes each constraint refused; a node counts where it was refused first, so that all numbers and
    /// `possible` together are `nodes`.
    pub refused: Vec<RefusedBy>,
}

/// How many nodes a constraint refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedBy {
    /// The constraint, in words.
    pub constraint: String,
    /// How many nodes.
    pub nodes: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constraints_are_read_as_they_are_written() {
        for text in ["zone=a", "zone!=a", "zone in (a,b)", "ssd"] {
            assert_eq!(text.parse::<Constraint>().unwrap().to_string(), text);
        }
        assert_eq!(" zone  in  (a , b) ".parse::<Constraint>().unwrap().to_string(), "zone in (a,b)");
        for text in ["", "=a", "a=", "a=b=c", "a in b", "a in ()", "a b"] {
            assert!(text.parse::<Constraint>().is_err(), "{text}");
        }
        let json = serde_json::to_string(&"zone in (a,b)".parse::<Constraint>().unwrap()).unwrap();
        assert_eq!(json, r#"{"key":"zone","op":"in","value":["a","b"]}"#);
        assert_eq!(serde_json::from_str::<Constraint>(&json).unwrap().to_string(), "zone in (a,b)");
        assert!(serde_json::from_str::<Constraint>(r#"{"key":"ssd","op":"exists"}"#).is_ok());
    }

    #[test]
    fn a_label_that_is_missing_is_unequal_to_everything_and_equal_to_nothing() {
        let holds = |text: &str, value| text.parse::<Constraint>().unwrap().holds(value);
        assert!(holds("zone!=a", None) && !holds("zone=a", None));
        assert!(!holds("zone", None) && !holds("zone in (a)", None));
        assert!(holds("zone in (a,b)", Some("b")) && !holds("zone!=a", Some("a")));
    }

    #[test]
    fn taints_and_groups_have_texts() {
        for text in ["gpu=a100:no-schedule", "old:prefer-no-schedule"] {
            assert_eq!(text.parse::<Taint>().unwrap().to_string(), text);
        }
        assert!("gpu".parse::<Taint>().is_err() && "gpu:never".parse::<Taint>().is_err());
        let taint: Taint = "gpu=a100:no-schedule".parse().unwrap();
        assert!("gpu".parse::<Toleration>().unwrap().covers(&taint));
        assert!(!"gpu=h100".parse::<Toleration>().unwrap().covers(&taint));
        let group: AntiAffinity = "web:zone:soft".parse().unwrap();
        assert_eq!((group.scope, group.soft), (Scope::Zone, true));
        assert!("web:soft".parse::<AntiAffinity>().unwrap().soft);
        assert!(
            "web:moon".parse::<AntiAffinity>().is_err() && "web:soft:soft".parse::<AntiAffinity>().is_err()
        );
    }

    #[test]
    fn pauses_double_up_to_the_limit() {
        let restart = Restart::default();
        assert_eq!(
            (restart.pause_ms(0), restart.pause_ms(3), restart.pause_ms(200)),
            (1_000, 8_000, 300_000)
        );
    }
}
