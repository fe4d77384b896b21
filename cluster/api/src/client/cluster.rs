//! Calls about the cluster itself.

use hyper::Method;

use super::transport::{self, Call};
use super::{Client, ClientError, escape};
use crate::Page;
use crate::cluster::{
    Admission, Applicant, ClusterStatus, CreateToken, InitCluster, JoinCluster, NodeView, RaiseLevel,
    TokenView, TransferLeader,
};
use crate::placement::{DrainNode, NodePolicy};

impl Client {
    /// How the cluster is, as the node sees it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn cluster(&self) -> Result<ClusterStatus, ClientError> {
        self.get("/v1/cluster".into()).await
    }

    /// Lets other nodes join the node. It starts its parts anew, so the next call may have to be repeated.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn init_cluster(&self, init: &InitCluster) -> Result<ClusterStatus, ClientError> {
        self.once(Call::new(Method::POST, "/v1/cluster:init".into()).json(init)?).await
    }

    /// Lets the node leave its own empty cluster and join another one. It starts its parts anew.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 when its own cluster is not empty.
    pub async fn join_cluster(&self, join: &JoinCluster) -> Result<Admission, ClientError> {
        self.once(Call::new(Method::POST, "/v1/node:join".into()).json(join)?).await
    }

    /// Asks to join, as a node, with the secret of a join token as this client's access.
    ///
    /// # Errors
    /// See [`ClientError`]; 403 when the token is of no use.
    pub async fn apply_to_join(&self, applicant: &Applicant) -> Result<Admission, ClientError> {
        self.once(Call::new(Method::POST, "/v1/cluster:join".into()).json(applicant)?).await
    }

    /// Asks for another leader.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn transfer_leader(&self, to: &TransferLeader) -> Result<ClusterStatus, ClientError> {
        self.once(Call::new(Method::POST, "/v1/cluster:transfer-leader".into()).json(to)?).await
    }

    /// Begins to change the cluster's certificate authority.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 while a change is under way.
    pub async fn rotate_authority(&self) -> Result<ClusterStatus, ClientError> {
        self.once(Call::new(Method::POST, "/v1/cluster:rotate-authority".into())).await
    }

    /// Raises the feature level.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 when some node does not know it.
    pub async fn raise_level(&self, level: &RaiseLevel) -> Result<ClusterStatus, ClientError> {
        self.once(Call::new(Method::POST, "/v1/cluster:raise-level".into()).json(level)?).await
    }

    /// Makes a join token (`join-tokens`) or a token for the API (`tokens`).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn create_token(&self, kind: &str, token: &CreateToken) -> Result<TokenView, ClientError> {
        self.once(Call::new(Method::POST, format!("/v1/{kind}")).json(token)?).await
    }

    /// Join tokens (`join-tokens`) or tokens for the API (`tokens`).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn list_tokens(&self, kind: &str) -> Result<Page<TokenView>, ClientError> {
        self.get(format!("/v1/{kind}")).await
    }

    /// Revokes a token.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn delete_token(&self, kind: &str, name: &str) -> Result<(), ClientError> {
        let call = &mut Call::new(Method::DELETE, format!("/v1/{kind}/{}", escape(name)));
        self.send(call).await.map(drop)
    }

    /// All nodes in order of number.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn list_nodes(&self) -> Result<Page<NodeView>, ClientError> {
        self.get("/v1/nodes".into()).await
    }

    /// One node.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn node(&self, name: &str) -> Result<NodeView, ClientError> {
        self.get(format!("/v1/nodes/{}", escape(name))).await
    }

    /// Lets a node get no new VMs, or lets it again.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn cordon(&self, name: &str, cordoned: bool) -> Result<NodeView, ClientError> {
        let verb = if cordoned { "cordon" } else { "uncordon" };
        self.once(Call::new(Method::POST, format!("/v1/nodes/{}:{verb}", escape(name)))).await
    }

    /// Moves the VMs of a node away; each has `grace_ms` milliseconds to end.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 422.
    pub async fn drain(&self, name: &str, grace_ms: u64) -> Result<NodeView, ClientError> {
        let call = Call::new(Method::POST, format!("/v1/nodes/{}:drain", escape(name)));
        self.once(call.json(&DrainNode { grace_ms })?).await
    }

    /// Declares a node down, whatever was declared down just before. Nobody checks it.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn declare_down(&self, name: &str) -> Result<NodeView, ClientError> {
        self.once(Call::new(Method::POST, format!("/v1/nodes/{}:down", escape(name)))).await
    }

    /// What the operator says about a node.
    ///
    /// # Errors
    /// See [`ClientError`]; 404.
    pub async fn node_policy(&self, name: &str) -> Result<NodePolicy, ClientError> {
        self.get(format!("/v1/nodes/{}/policy", escape(name))).await
    }

    /// Says something else about a node.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 422.
    pub async fn set_node_policy(&self, name: &str, policy: &NodePolicy) -> Result<NodeView, ClientError> {
        let call = Call::new(Method::PUT, format!("/v1/nodes/{}/policy", escape(name)));
        self.once(call.json(policy)?).await
    }

    /// Forgets a node for ever.
    ///
    /// # Errors
    /// See [`ClientError`]; 404, 409 when VMs are placed there.
    pub async fn remove_node(&self, name: &str) -> Result<NodeView, ClientError> {
        self.once(Call::new(Method::DELETE, format!("/v1/nodes/{}", escape(name)))).await
    }

    async fn once<T: serde::de::DeserializeOwned>(&self, mut call: Call) -> Result<T, ClientError> {
        let response = self.send(&mut call).await?;
        transport::json(self.host(), response).await
    }
}
