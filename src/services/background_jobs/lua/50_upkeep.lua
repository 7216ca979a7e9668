-- What the reconciler and the statistics ask for.

-- Whether a run whose lease is renewed goes on for longer than the job's running time and `stuck_ms` allow.
local function overruns(rec, now, stuck_ms)
  return rec.status == 'running' and rec.timeout > 0 and rec.lease_until > now and
         stop_clock(rec, now) - rec.timeout > stuck_ms
end

-- orphans(root; limit, stuck_ms): jobs whose time in the `due` index has come. A claim and its renewals leave that
-- index alone, so a job that is held or not due yet is put off here, to the end of its lease or its due time. Any other
-- is put off too, so that of several reconcilers only one looks at it, and ever less often; a dead run at the latest to
-- the moment at which it counts as stuck.
-- Answers (id, status, generation, fence, task, trouble)*; trouble: queued, lease_expired, stuck, overrun.
local function orphans(keys, args)
  local root, now, stuck_ms, answers = keys[1], now_ms(), tonumber(args[2]), {}
  local ids = redis.call('ZRANGEBYSCORE', root .. ':due', '-inf', now, 'LIMIT', 0, args[1])
  for _, id in ipairs(ids) do
    local k = keys_of(root, id)
    local rec = load_record(k, CLAIM_FIELDS)
    local busy = rec and (rec.status == 'running' and rec.lease_until or rec.not_before) or 0
    local again = rec and now + math.max(60000, math.floor((now - rec.created) / 2))
    local trouble
    if not rec or TERMINAL[rec.status] then
      redis.call('ZREM', k.due, id)
    elseif overruns(rec, now, stuck_ms) then
      trouble, again = 'overrun', now + 60000
    elseif busy + GRACE_MS > now then
      redis.call('ZADD', k.due, busy + GRACE_MS, id)
    elseif rec.status == 'queued' then
      trouble = 'queued'
    elseif now - rec.lease_until > stuck_ms then
      trouble = 'stuck'
    else
      trouble, again = 'lease_expired', math.min(again, rec.lease_until + stuck_ms + 1)
    end
    if trouble then
      redis.call('ZADD', k.due, again, id)
      for _, value in ipairs({ id, rec.status, rec.generation, rec.fence,
                               redis.call('HGET', k.job, 'task') or '', trouble }) do
        answers[#answers + 1] = value
      end
    end
  end
  return answers
end

-- reclaim(root; id, status, generation, fence, trouble): step 12, for a job that is not in the stream. Answers 'publish'
-- (it is queued and its task is to be published again), 'settled' (it ended) or 'changed' (somebody was faster).
local function reclaim(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec = load_record(k, CLAIM_FIELDS)
  if not rec or rec.status ~= args[2] or rec.generation ~= tonumber(args[3]) or rec.fence ~= tonumber(args[4]) or
     (rec.status == 'running' and rec.lease_until > now) or TERMINAL[rec.status] then
    return 'changed'
  end
  if redis.call('HEXISTS', k.job, 'task') == 0 then
    end_failed(k, rec, now, 'lost', 'the job is not in the queue and its record holds no task; submit it again')
    return 'settled'
  end
  if rec.cancel then
    end_cancelled(k, rec, now, rec.cancel)
    return 'settled'
  end
  if rec.expires > 0 and rec.expires <= now and rec.started == 0 then
    end_failed(k, rec, now, 'expired', 'the job was not started before its expires_at; submit it again')
    return 'settled'
  end
  local done, marked = calls_of(k)
  if #marked > 0 and count(done) + #marked >= rec.total then
    end_unknown(k, rec, now, marked)
    return 'settled'
  end
  if rec.status == 'running' then
    redis.call('HINCRBY', k.root .. ':totals', 'leases_lost', 1)
    local reason = args[5] == 'stuck' and 'stuck' or 'lease_expired'
    emit(k, rec, now, 'job.queued', '{"tier":"' .. rec.tier .. '","reason":"' .. reason .. '"}')
    wait_again(k, rec, now, 0, stop_clock(rec, now))
  end
  return 'publish'
end

-- end_overrun(root; id, generation, fence, stuck_ms): step 12, for a run that its worker should have ended. The status
-- takes the job from its attempt, whose renewal and writes are 'lost' from now on, so the fence need not grow; it stays
-- that the attempt may still tell the true outcome of a call that must not run twice. Answers 'settled' or 'changed'.
local function end_overrun(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec = load_record(k, CLAIM_FIELDS)
  if not rec or rec.generation ~= tonumber(args[2]) or rec.fence ~= tonumber(args[3]) or
     not overruns(rec, now, tonumber(args[4])) then
    return 'changed'
  end
  local _, marked = calls_of(k)
  if rec.cancel then
    end_cancelled(k, rec, now, rec.cancel)
  elseif #marked > 0 then
    end_unknown(k, rec, now, marked, 'stuck')
  else
    end_failed(k, rec, now, 'timeout', 'the job used up its running time of ' .. (rec.timeout / 1000) ..
               ' s and its worker did not end it; its results so far are kept', 'stuck')
  end
  return 'settled'
end

-- How many ids of expired jobs a partition remembers, and for how long: they turn a 404 into a 410, nothing else.
local GONE_MAX = 5000
local GONE_MS = 7 * 24 * 3600 * 1000

-- prune(root; limit): drops expired jobs from the indexes. A job that came back under its Idempotency-Key is not gone.
local function prune(keys, args)
  local root, now = keys[1], now_ms()
  local tombs = root .. ':gone'
  local gone = redis.call('ZRANGEBYSCORE', root .. ':expiry', '-inf', now, 'LIMIT', 0, args[1])
  for _, member in ipairs(gone) do
    local tier, status, id = string.match(member, '^(%a+):(%a+):(.+)$')
    redis.call('ZREM', root .. ':ix:' .. tier .. ':' .. status, id)
    redis.call('ZREM', root .. ':expiry', member)
    if redis.call('EXISTS', root .. ':job:' .. id) == 0 then redis.call('ZADD', tombs, now, id) end
  end
  if #gone > 0 then
    redis.call('ZREMRANGEBYSCORE', tombs, '-inf', now - GONE_MS)
    redis.call('ZREMRANGEBYRANK', tombs, 0, -GONE_MAX - 1)
    redis.call('PEXPIRE', tombs, GONE_MS)
  end
  return #gone
end

-- expired(root; id): 1 where something still proves that a job of this id ended and its record is gone, else 0.
local function expired(keys, args)
  local root, id = keys[1], args[1]
  if redis.call('EXISTS', root .. ':job:' .. id) == 1 then return 0 end
  if redis.call('ZSCORE', root .. ':gone', id) then return 1 end
  for _, tier in ipairs({ 'high', 'normal', 'low' }) do
    for status in pairs(TERMINAL) do
      if redis.call('ZSCORE', root .. ':expiry', tier .. ':' .. status .. ':' .. id) then return 1 end
    end
  end
  return 0
end

-- stats(root): (tier, queued, running, ms since the creation of the oldest queued job that is due)*3, then jobs ended
-- in this and the last full minute, in 15 minutes, then the totals as (name, count)*.
local function stats(keys)
  local root, now, answers = keys[1], now_ms(), {}
  for _, tier in ipairs({ 'high', 'normal', 'low' }) do
    local queued, age = root .. ':ix:' .. tier .. ':queued', 0
    for _, id in ipairs(redis.call('ZRANGE', queued, 0, 49)) do
      local times = redis.call('HMGET', root .. ':job:' .. id, 'created', 'not_before')
      if times[1] and tonumber(times[2] or 0) <= now then
        age = now - math.max(tonumber(times[1]), tonumber(times[2] or 0))
        break
      end
    end
    for _, value in ipairs({ tier, redis.call('ZCARD', queued), redis.call('ZCARD', root .. ':ix:' .. tier .. ':running'),
                             math.max(0, age) }) do
      answers[#answers + 1] = value
    end
  end
  local minute, last, fifteen = math.floor(now / 60000), 0, 0
  for back = 0, 14 do
    local ended = tonumber(redis.call('GET', root .. ':rate:' .. (minute - back)) or 0)
    fifteen = fifteen + ended
    if back <= 1 then last = last + ended end
  end
  answers[#answers + 1], answers[#answers + 2] = last, fifteen
  for _, value in ipairs(redis.call('HGETALL', root .. ':totals')) do answers[#answers + 1] = value end
  return answers
end

-- heartbeat(root; worker, ttl_ms, JSON). By the server's clock, so a worker whose clock is wrong is not lost.
local function heartbeat(keys, args)
  local now = now_ms()
  redis.call('HSET', keys[1] .. ':beats', args[1],
             now .. '|' .. (now + tonumber(args[2])) .. '|' .. args[3])
  return now
end

-- workers(root): (ms of the last heartbeat, JSON)* of those that have not run out; the others are dropped.
local function workers(keys)
  local beats, now, answers = redis.call('HGETALL', keys[1] .. ':beats'), now_ms(), {}
  for i = 1, #beats, 2 do
    local seen, until_ms, text = string.match(beats[i + 1], '^(%d+)|(%d+)|(.*)$')
    if tonumber(until_ms) < now then
      redis.call('HDEL', keys[1] .. ':beats', beats[i])
    else
      answers[#answers + 1] = seen
      answers[#answers + 1] = text
    end
  end
  return answers
end

redis.register_function('{prefix}_orphans', orphans)
redis.register_function('{prefix}_reclaim', reclaim)
redis.register_function('{prefix}_end_overrun', end_overrun)
redis.register_function('{prefix}_prune', prune)
redis.register_function({ function_name = '{prefix}_expired', callback = expired, flags = { 'no-writes' } })
redis.register_function({ function_name = '{prefix}_stats', callback = stats, flags = { 'no-writes' } })
redis.register_function('{prefix}_heartbeat', heartbeat)
redis.register_function('{prefix}_workers', workers)
