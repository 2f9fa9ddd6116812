"""Hub: what robots tell about themselves on the side channel, one entry a session, bounded. Never actions.

Called by `serve.dashboard` on the event loop's thread only. Knows neither sockets, nor the Service, nor the page that
draws it. A robot's own end is `robots.side`.

The side channel is the websocket `/v1/robots/side`. It is optional: a robot is controlled the same without it.
Every message is one binary websocket message: a msgpack map. A robot's has exactly ONE key, which names its kind, and
at most `MAX_MESSAGE_BYTES` (288 KiB). Unknown keys are ignored, counted and logged once; missing ones are refused.
"?" marks what may be absent or nil.

Robot -> server
    first    {"hello": {
        "robot_id": str, "session_id": str,   1..128 bytes each; the ones that its observations carry
        "world": str, "task": str,            0..64 bytes each: "metaworld", "drawer-open"
        "prompt": str,                        the robot's own instruction, 0..4096 bytes
        "control_hz": float,                  the rate that it wants to hold, 0 < hz <= 1000
    }}
    then     {"telemetry": {                  10 a second while watched, 1 a second otherwise; the newest wins
        "tick": int,                          control ticks run since the robot started
        "queue": [[float, ...], ...],         actions left, next one first: row i is for tick `tick + i`;
                                              0..64 rows of 1..32 numbers, all rows of one length
        "rate_hz": float,                     control rate measured over the last second or so
        "obs_age_ms": float?,                 age of the observation behind the action of the last tick, when it was
                                              applied; nil while holding
        "num_misses": int,                    ticks without a valid action whose observation is at most 250 ms old
        "num_holds": int,                     ticks at which the queue was dry and the robot held
        "episode": int,                       index of the running episode, from 0
        "num_episodes": int,                  finished episodes
        "num_successes": int,                 those of them that were solved
        "is_success": bool,                   the running episode is solved
        "task": str?, "prompt": str?,         when they changed since the hello
        "reply_prompt": str?,                 the prompt that the newest reply says it followed
        "latency_ms": float?,                 newest chunk: observation sent -> chunk received
    }}
    and      {"jpeg": bytes}                  only while watched, at most `max_view_hz`, at most 256 KiB, a whole JPEG,
                                              upright, any size (224 x 224 is plenty); the newest wins
Server -> robot
    {"watch": bool, "max_view_hz": float}     right after the hello (that is its acknowledgement) and at every change:
                                              whether somebody looks, and how many views a second at most (10 for a
                                              few robots, fewer when many share a machine). Until then: nobody does
    {"error": {"code": str, "message": str, "next_step": str}}
                                              the message before was refused; the connection lives on, except after a
                                              refused hello (closed with 1008)

Counters are cumulative since the robot's start. All numbers are finite and not negative, except actions' values.
Close codes: 1003 text message, 1002 not one msgpack map, 1008 refused hello, or another connection of the same
robot took over, 1009 too large. A robot that is closed with anything else reconnects with a growing pause.
The hub forgets a robot when its connection ends.
"""
