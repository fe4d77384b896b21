//! `cluster`, `join`, `node` and `token`: the cluster itself.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use blixard_api::cluster::{
    ClusterStatus, CreateToken, InitCluster, JoinCluster, NodeRoom, NodeView, RaiseLevel, TokenView,
    TransferLeader,
};
use blixard_api::token::JoinToken;
use clap::{Args, Subcommand};

use crate::Context;
use crate::args::Format;
use crate::error::{CliError, code};
use crate::list::now_ms;
use crate::output::Table;
use crate::units::{self, show_age};

/// First and longest pause between looks at a node that starts its parts anew.
const LOOK_MS: (u64, u64) = (20, 250);

/// `cluster …`
#[derive(Debug, Subcommand)]
pub enum Cluster {
    /// Let other nodes join this one; also makes the cluster's certificate authority
    Init(Here),
    /// Show leader, voters, feature level
    Status,
    /// Let another node lead
    TransferLeader {
        /// Name of the node; otherwise any other voter
        to: Option<String>,
    },
    /// Change the cluster's certificate authority; all nodes follow by themselves
    RotateAuthority {
        /// Return at once
        #[arg(long)]
        no_wait: bool,
        /// Longest time to wait until it is done
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration)]
        timeout: Duration,
    },
    /// Raise the feature level once all nodes run the new version: there is no way back to the old one then
    RaiseLevel {
        /// To which; otherwise to what the node's program knows
        level: Option<u32>,
    },
    /// Join tokens: make, list, revoke
    #[command(subcommand)]
    Token(JoinTokens),
}

/// Addresses of this host.
#[derive(Debug, Args)]
pub struct Here {
    /// Address of this host by which other nodes and users reach it
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub address: SocketAddr,
    /// Where to listen for them, when that is another address
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub bind: Option<SocketAddr>,
    /// Longest time to wait until it is done
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = units::parse_duration)]
    pub timeout: Duration,
}

/// `join`
#[derive(Debug, Args)]
pub struct Join {
    /// What `blixard cluster token create` printed
    pub token: String,
    #[command(flatten)]
    pub here: Here,
}

/// `cluster token …`
#[derive(Debug, Subcommand)]
pub enum JoinTokens {
    /// Make a token that lets one node join
    Create {
        /// How long it is valid, at most 7 days
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = units::parse_duration)]
        ttl: Duration,
    },
    /// List tokens that were not used
    Ls,
    /// Revoke tokens
    Rm {
        /// Names as `ls` shows them
        #[arg(required = true, value_name = "TOKEN")]
        names: Vec<String>,
    },
}

/// `token …`
#[derive(Debug, Subcommand)]
pub enum ApiTokens {
    /// Make a token for the API over TLS (https://…), in place of one with the same name
    Create {
        /// Its name
        name: String,
        /// How long it is valid; otherwise until it is revoked
        #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
        ttl: Option<Duration>,
    },
    /// List tokens
    Ls,
    /// Revoke tokens
    Rm {
        /// Their names
        #[arg(required = true, value_name = "TOKEN")]
        names: Vec<String>,
    },
}

/// `node …`
#[derive(Debug, Subcommand)]
pub enum Node {
    /// List nodes
    Ls,
    /// Show all about nodes (a JSON array)
    Show {
        /// Their names
        #[arg(required = true, value_name = "NODE")]
        names: Vec<String>,
    },
    /// Let nodes get no new VMs
    Cordon {
        /// Their names
        #[arg(required = true, value_name = "NODE")]
        names: Vec<String>,
    },
    /// Let nodes get new VMs again
    Uncordon {
        /// Their names
        #[arg(required = true, value_name = "NODE")]
        names: Vec<String>,
    },
    /// Forget nodes for ever, also dead ones; each must have no VM
    Rm {
        /// Their names
        #[arg(required = true, value_name = "NODE")]
        names: Vec<String>,
    },
    #[command(flatten)]
    Operate(crate::node::Operate),
}

/// `cluster`.
pub async fn cluster(context: &Context, command: Cluster) -> Result<u8, CliError> {
    let client = &context.client;
    let status = match command {
        Cluster::Init(here) => {
            client.init_cluster(&InitCluster { address: here.address, bind: here.bind }).await?;
            until(here.timeout, "the node does not serve at its address yet", async || {
                let nodes = client.list_nodes().await.ok()?;
                nodes.items.iter().any(|node| node.address == Some(here.address)).then_some(())
            })
            .await?;
            client.cluster().await?
        }
        Cluster::Status => client.cluster().await?,
        Cluster::TransferLeader { to } => client.transfer_leader(&TransferLeader { to }).await?,
        Cluster::RotateAuthority { no_wait, timeout } => {
            let begun = client.rotate_authority().await?;
            if no_wait {
                begun
            } else {
                until(timeout, "some node does not follow: blixard node ls", async || {
                    client.cluster().await.ok().filter(|status| !status.rotating)
                })
                .await?
            }
        }
        Cluster::RaiseLevel { level } => client.raise_level(&RaiseLevel { level }).await?,
        Cluster::Token(command) => return join_tokens(context, command).await,
    };
    show_status(context, &status)?;
    Ok(0)
}

/// `join`.
pub async fn join(context: &Context, options: Join) -> Result<u8, CliError> {
    let token: JoinToken = options.token.parse().map_err(|error| CliError::Usage {
        message: format!("{error}"),
        suggestion: "blixard cluster token create, on a node of the cluster".into(),
    })?;
    let Here { address, bind, timeout } = options.here;
    let client = &context.client;
    let admission = client.join_cluster(&JoinCluster { token: token.to_string(), address, bind }).await?;
    until(timeout, "the node has joined, but does not know the cluster yet", async || {
        let nodes = client.list_nodes().await.ok()?;
        nodes.items.into_iter().find(|node| node.id == admission.node && node.address == Some(address))
    })
    .await?;
    show_status(context, &client.cluster().await?)?;
    Ok(0)
}

/// Asks again and again for what no request can wait for, since the node's parts end and begin meanwhile.
async fn until<T>(time: Duration, late: &str, look: impl AsyncFn() -> Option<T>) -> Result<T, CliError> {
    let begin = Instant::now();
    let mut pause = LOOK_MS.0;
    loop {
        if let Some(found) = look().await {
            return Ok(found);
        }
        if begin.elapsed() >= time {
            return Err(CliError::Vm {
                message: format!("after {} s {late}", time.as_secs()),
                suggestion: "look at the node's log; blixard cluster status shows how it goes on".into(),
                code: code::TIMEOUT,
            });
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
        pause = pause.saturating_mul(2).min(LOOK_MS.1);
    }
}

fn show_status(context: &Context, status: &ClusterStatus) -> Result<(), CliError> {
    let output = context.output;
    if output.structured() {
        return output.value(status);
    }
    if output.quiet || output.format == Format::Name {
        return output.line(status.cluster.as_deref().unwrap_or_default());
    }
    let none = || "none".to_owned();
    let level = if status.feature_level_known > status.feature_level {
        format!("{} (this node knows {})", status.feature_level, status.feature_level_known)
    } else {
        status.feature_level.to_string()
    };
    for (what, value) in [
        (
            "cluster",
            status.cluster.clone().unwrap_or_else(|| "of one node; cluster init lets others join".into()),
        ),
        ("leader", status.leader.clone().unwrap_or_else(none)),
        ("voters", status.voters.join(", ")),
        ("nodes", status.nodes.to_string()),
        ("feature level", level),
        ("lease", format!("{} s", f64::from(u32::try_from(status.lease_ms).unwrap_or(u32::MAX)) / 1000.0)),
        ("term", status.term.to_string()),
        ("applied", format!("{} of {}", status.applied, status.last_log)),
        ("authority", if status.rotating { "is being changed".into() } else { "settled".into() }),
    ] {
        output.line(&format!("{what:<14} {value}"))?;
    }
    Ok(())
}

async fn join_tokens(context: &Context, command: JoinTokens) -> Result<u8, CliError> {
    const KIND: &str = "join-tokens";
    match command {
        JoinTokens::Create { ttl } => {
            let wanted = CreateToken { name: None, ttl_ms: Some(milliseconds(ttl)) };
            show_new(context, &context.client.create_token(KIND, &wanted).await?)
        }
        JoinTokens::Ls => list_tokens(context, KIND).await,
        JoinTokens::Rm { names } => remove_tokens(context, KIND, &names).await,
    }
}

/// `token`.
pub async fn token(context: &Context, command: ApiTokens) -> Result<u8, CliError> {
    const KIND: &str = "tokens";
    match command {
        ApiTokens::Create { name, ttl } => {
            let wanted = CreateToken { name: Some(name), ttl_ms: ttl.map(milliseconds) };
            show_new(context, &context.client.create_token(KIND, &wanted).await?)
        }
        ApiTokens::Ls => list_tokens(context, KIND).await,
        ApiTokens::Rm { names } => remove_tokens(context, KIND, &names).await,
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The text of a token goes to standard output alone, so that it can be handed on.
fn show_new(context: &Context, token: &TokenView) -> Result<u8, CliError> {
    if context.output.structured() {
        context.output.value(token)?;
    } else {
        context.output.line(token.token.as_deref().unwrap_or_default())?;
    }
    Ok(0)
}

async fn list_tokens(context: &Context, kind: &str) -> Result<u8, CliError> {
    let page = context.client.list_tokens(kind).await?;
    let output = context.output;
    if output.structured() {
        output.value(&page.items)?;
    } else if output.quiet || output.format == Format::Name {
        page.items.iter().try_for_each(|token| output.line(&token.name))?;
    } else {
        let now = now_ms();
        let mut table = Table::new(&["NAME", "AGE", "ENDS IN"]);
        for token in &page.items {
            let ends = token
                .expires_at_ms
                .map(|end| if end <= now { "over".to_owned() } else { show_age(end.saturating_sub(now)) });
            let age = show_age(now.saturating_sub(token.created_at_ms));
            table.row(vec![token.name.clone(), age, ends.unwrap_or_else(|| "never".into())]);
        }
        output.text(&table.render())?;
    }
    Ok(0)
}

async fn remove_tokens(context: &Context, kind: &str, names: &[String]) -> Result<u8, CliError> {
    for name in names {
        context.client.delete_token(kind, name).await?;
        context.output.line(name)?;
    }
    Ok(0)
}

/// `node`.
pub async fn node(context: &Context, command: Node) -> Result<u8, CliError> {
    let (client, output) = (&context.client, context.output);
    match command {
        Node::Ls => {
            let page = client.list_nodes().await?;
            if output.structured() {
                output.value(&page.items)?;
            } else if output.quiet || output.format == Format::Name {
                page.items.iter().try_for_each(|node| output.line(&node.name))?;
            } else {
                output.text(&table(&page.items, output.format == Format::Wide))?;
            }
        }
        Node::Show { names } => {
            let mut views = Vec::new();
            for name in &names {
                views.push(client.node(name).await?);
            }
            output.value(&views)?;
        }
        Node::Cordon { names } => {
            for name in &names {
                output.line(&client.cordon(name, true).await?.name)?;
            }
        }
        Node::Uncordon { names } => {
            for name in &names {
                output.line(&client.cordon(name, false).await?.name)?;
            }
        }
        Node::Operate(command) => return crate::node::operate(context, command).await,
        Node::Rm { names } => {
            for name in &names {
                output.line(&client.remove_node(name).await?.name)?;
            }
        }
    }
    Ok(0)
}

fn table(nodes: &[NodeView], wide: bool) -> String {
    let mut head = vec!["NAME", "ROLE", "ADDRESS", "STATUS", "VMS", "SCHEDULES", "VERSION"];
    if wide {
        head.extend(["ID", "LEVEL", "CPUS", "MEMORY", "DISK", "LABELS", "HEARD"]);
    }
    let mut table = Table::new(&head);
    for node in nodes {
        let mut row = vec![
            node.name.clone(),
            node.role.to_string(),
            node.address.map(|address| address.to_string()).unwrap_or_default(),
            node.status.to_string(),
            node.vms.to_string(),
            if node.draining {
                "draining".into()
            } else if node.cordoned {
                "no".into()
            } else {
                "yes".into()
            },
            node.version.clone(),
        ];
        if wide {
            let labels: Vec<String> = node.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let heard = node.heard_ms_ago.map(|ms| format!("{ms} ms ago")).unwrap_or_default();
            row.extend([node.id.to_string(), node.feature_level.to_string()]);
            row.extend(fill(&node.used, node.room.as_ref()));
            row.extend([labels.join(","), heard]);
        }
        table.row(row);
    }
    table.render()
}

/// Processors, memory and disk: what is taken, and of how much.
fn fill(used: &NodeRoom, room: Option<&NodeRoom>) -> [String; 3] {
    // Tenths of processors are enough to see.
    let cpus = |milli: u64| match milli % 1000 / 100 {
        0 => (milli / 1000).to_string(),
        tenths => format!("{}.{tenths}", milli / 1000),
    };
    let of = |used: String, room: Option<String>| format!("{used}/{}", room.as_deref().unwrap_or("?"));
    [
        of(cpus(used.cpu_milli), room.map(|room| cpus(room.cpu_milli))),
        of(used.memory_mib.to_string(), room.map(|room| format!("{} MiB", room.memory_mib))),
        of(used.disk_mib.to_string(), room.map(|room| format!("{} MiB", room.disk_mib))),
    ]
}

#[cfg(test)]
mod tests {
    use blixard_api::cluster::{NodeRole, NodeState};

    use super::*;

    #[test]
    fn the_table_shows_who_leads_and_who_gets_vms() {
        let node = NodeView {
            name: "a".into(),
            id: 1,
            role: NodeRole::Leader,
            address: Some("192.0.2.1:7440".parse().unwrap()),
            labels: [("zone".to_owned(), "z".to_owned())].into(),
            cordoned: true,
            draining: false,
            status: NodeState::Suspected,
            leased: true,
            version: "0.1.0".into(),
            feature_level: 2,
            vms: 3,
            used: NodeRoom { cpu_milli: 1500, memory_mib: 384, disk_mib: 0 },
            room: Some(NodeRoom { cpu_milli: 200_000, memory_mib: 7680, disk_mib: 102_400 }),
            heard_ms_ago: None,
        };
        let text = table(std::slice::from_ref(&node), false);
        assert!(
            text.contains("a      leader   192.0.2.1:7440   suspected   3     no          0.1.0"),
            "{text}"
        );
        let wide = table(std::slice::from_ref(&node), true);
        assert!(wide.contains("1.5/200   384/7680 MiB   0/102400 MiB   zone=z"), "{wide}");
        let untold = table(&[NodeView { room: None, ..node }], true);
        assert!(untold.contains("1.5/?   384/?    0/?"), "{untold}");
    }
}
