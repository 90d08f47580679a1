//! Commands about secure channels and messages.

use crate::args::{Answer, Args};
use crate::content::content;
use crate::peer::{address, line, Peer};
use crate::workers::describe;
use ockam::identity::SecureChannelRegistryEntry;
use ockam::MessageSendReceiveOptions;
use ockam_core::{LocalMessage, NeutralMessage, Route, Routed};
use serde_json::{json, Value};
use std::time::{Duration, Instant};

impl Peer {
    pub async fn listener(&self, args: &Args) -> Answer {
        let at = args.text("address")?;
        let id = self.identity(args.text("identity")?)?;
        let options = self.listener_options(args).await?;
        let flow = options.spawner_flow_control_id();
        self.node
            .create_secure_channel_listener(&id, address(at), options)
            .map_err(line)?;
        self.names
            .lock()
            .unwrap()
            .flows
            .insert(at.to_string(), flow);
        Ok(json!({}))
    }

    pub async fn dial(&self, args: &Args) -> Answer {
        let name = args.text("name")?;
        let id = self.identity(args.text("identity")?)?;
        let route = self.route(args, "route")?;
        let options = self.channel_options(args).await?;
        let flow = options.producer_flow_control_id();
        let start = Instant::now();
        let channel = self
            .node
            .create_secure_channel(&id, route, options)
            .await
            .map_err(line)?;
        let answer = json!({
            "peer": channel.their_identifier().to_string(),
            "encryptor": channel.encryptor_address().address(),
            "decryptor": channel.decryptor_remote_address().address(),
            "us": start.elapsed().as_micros() as u64,
        });
        let mut names = self.names.lock().unwrap();
        names.flows.insert(name.to_string(), flow);
        names.channels.insert(name.to_string(), channel);
        Ok(answer)
    }

    pub fn reroute(&self, args: &Args) -> Answer {
        let channel = self.channel(args.text("name")?)?;
        channel
            .update_remote_node_route(self.route(args, "route")?)
            .map_err(line)?;
        Ok(json!({}))
    }

    /// Stops a channel by the name it was dialled with or by its encryptor's address; sends Close.
    pub fn close(&self, args: &Args) -> Answer {
        let encryptor = match args.maybe_text("encryptor") {
            Some(text) => address(text),
            None => self
                .channel(args.text("name")?)?
                .encryptor_address()
                .clone(),
        };
        self.node
            .secure_channels()
            .stop_secure_channel(self.node.context(), &encryptor)
            .map_err(line)?;
        Ok(json!({}))
    }

    fn live(&self, role: Option<&str>) -> Vec<SecureChannelRegistryEntry> {
        let registry = self.node.secure_channels().secure_channel_registry();
        let mut list = registry.get_channel_list();
        list.retain(|entry| match role {
            Some("initiator") => entry.is_initiator(),
            Some("responder") => !entry.is_initiator(),
            _ => true,
        });
        list
    }

    pub fn channels(&self) -> Value {
        entries(&self.live(None))
    }

    /// Answers once exactly `count` channels of the role are up, or says how many are.
    pub async fn wait_channels(&self, args: &Args) -> Answer {
        let deadline = Instant::now() + args.timeout();
        loop {
            let list = self.live(args.maybe_text("role"));
            if list.len() as u64 == args.number("count", 1) {
                return Ok(entries(&list));
            }
            if Instant::now() >= deadline {
                return Err(format!("{} channels are up", list.len()));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends one message. Its return route is `return`, or empty.
    pub async fn send(&self, args: &Args) -> Answer {
        let payload = args.payload()?;
        let message = self.message(args)?.with_payload(payload);
        self.sender()?.forward(message).await.map_err(line)?;
        Ok(json!({}))
    }

    /// Sends `count` messages of the run `seed`, sizes taken from `sizes` in turn.
    pub async fn flood(&self, args: &Args) -> Answer {
        let sizes = args.sizes()?;
        let template = self.message(args)?;
        let context = self.sender()?;
        let seed = args.number("seed", 0);
        let mut bytes = 0;
        for index in 0..args.number("count", 1) {
            let size = sizes[index as usize % sizes.len()];
            let message = template.clone().with_payload(content(seed, index, size));
            context.forward(message).await.map_err(line)?;
            bytes += size;
        }
        Ok(json!({"bytes": bytes}))
    }

    fn message(&self, args: &Args) -> Result<LocalMessage, String> {
        let mut message = LocalMessage::new().with_onward_route(self.route(args, "route")?);
        if !args.list("return").is_empty() {
            message = message.with_return_route(self.route(args, "return")?);
        }
        Ok(message)
    }

    async fn ask(
        &self,
        route: Route,
        payload: Vec<u8>,
        timeout: Duration,
    ) -> Result<Routed<NeutralMessage>, String> {
        self.node
            .send_and_receive_extended::<NeutralMessage>(
                route,
                NeutralMessage::from(payload),
                MessageSendReceiveOptions::new().with_timeout(timeout),
            )
            .await
            .map_err(line)
    }

    pub async fn request(&self, args: &Args) -> Answer {
        let route = self.route(args, "route")?;
        let answer = self.ask(route, args.payload()?, args.timeout()).await?;
        Ok(describe(answer.local_message()))
    }

    /// Asks an echo worker `count` times, one after the other, and compares every answer.
    pub async fn requests(&self, args: &Args) -> Answer {
        let sizes = args.sizes()?;
        let route = self.route(args, "route")?;
        let seed = args.number("seed", 0);
        let start = Instant::now();
        let mut bytes = 0;
        for index in 0..args.number("count", 1) {
            let size = sizes[index as usize % sizes.len()];
            let payload = content(seed, index, size);
            let answer = self
                .ask(route.clone(), payload.clone(), args.timeout())
                .await
                .map_err(|e| format!("message {index} of {size} bytes: {e}"))?;
            if answer.payload() != payload {
                return Err(format!("message {index} of {size} bytes came back altered"));
            }
            bytes += size;
        }
        Ok(json!({"bytes": bytes, "us": start.elapsed().as_micros() as u64}))
    }
}

fn entries(list: &[SecureChannelRegistryEntry]) -> Value {
    list.iter()
        .map(|entry| {
            json!({
                "role": if entry.is_initiator() { "initiator" } else { "responder" },
                "peer": entry.their_id().to_string(),
                "encryptor": entry.encryptor_messaging_address().address(),
                "decryptor": entry.decryptor_messaging_address().address(),
            })
        })
        .collect()
}
